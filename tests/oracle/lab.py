"""One case of the oracle: a checkpoint, its runs, and what transformers and PEFT alone make of it."""

import math

import families
import plain
import pytest
import torch
from lightning.pytorch import Callback

from loralab.adapters.lora import LoRA
from loralab.models import loading, pretrained
from loralab.optim.optimizers import AdamW
from loralab.quantization.base import dense_weight
from loralab.quantization.four_bit import FourBit
from loralab.quantization.linear import FrozenLinear
from loralab.quantization.none import NoQuantization
from loralab.running.runner import Runner

STEPS, RATE = 30, 0.01
QUANTIZERS = {"dense": NoQuantization(), "nf4": FourBit(block_size=32)}  # the smallest layer has 32 weights


class Watch(Callback):
    """Keeps, of the first and the last step, each trial's rows, parameters and gradients."""

    pack_aware = True

    def __init__(self):
        self.seen = {}

    def on_train_batch_start(self, trainer, module, batch, index):
        self.batch = batch

    def on_before_optimizer_step(self, trainer, module, optimizer):
        for index, trial in enumerate(module.trials):
            if trial.step in (0, STEPS - 1):
                state = trial.adapter.peft_state()
                values = {name: value.detach().clone() for name, value in state.items()}
                trained = {name: value.grad for name, value in state.items() if value.requires_grad}
                for name, module in trial.adapter.saved_modules():
                    trained |= {f"base_model.model.{name}.{key}": p.grad for key, p in module.named_parameters()}
                grads = {name: None if grad is None else grad.clone() for name, grad in trained.items()}
                self.seen[trial.spec.id, trial.step] = (
                    [row for _, row in self.batch[index]["chosen"]],
                    values,
                    grads,
                )


class Lab:
    def __init__(self, task, family, scheme, make_spec, make_data, rows, tokenizer_folder, folder, spied, changes):
        self.family = family
        self.task, self.scheme, self.folder, self.make_spec = task, scheme, folder, make_spec
        self.make_data, self.tokenizer_folder = make_data, tokenizer_folder
        families.save(plain.AUTO[task], family, task, folder / "base", **changes)
        self.kind = "labels" if task == "sequence_classification" else "ragged"
        self.losses, self.texts = spied
        self.tokenizer = self.model.load_tokenizer()
        paths = {split: rows[self.kind, split] for split in ("train", "validation")}
        found = self.make_data(self.kind).splits().labels
        self.rows = {split: plain.rows(self.tokenizer, path, task, found) for split, path in paths.items()}

    @property
    def model(self):
        words = {"task": self.task, "max_length": 64, "dtype": "float32", "tokenizer": str(self.tokenizer_folder)}
        return pretrained.Pretrained(str(self.folder / "base"), **words)

    def spec(self, name, steps, batch, seed=0, **changes):
        generated = 0 if self.task == "sequence_classification" else 3
        data = self.make_data(self.kind, batch_size=batch, generate_rows=generated)
        given = {"model": self.model, "data": data, "max_steps": steps, "gradient_clip_val": None, "seed": seed}
        given.update(quantization=QUANTIZERS[self.scheme], optimizer=AdamW(lr=RATE))
        given.update(adapter=LoRA(r=4, lora_alpha=8, target_modules=families.TARGETS.get(self.family, "all-linear")))
        return self.make_spec(name, **{**given, **changes})

    def values(self):
        """{name: value} of the weights that the packed layers stand for."""
        if self.scheme == "dense":
            return {}
        labels = 3 if self.task == "sequence_classification" else None
        base = loading.load(self.model, QUANTIZERS[self.scheme], self.tokenizer, labels).model
        packed = {name: layer for name, layer in base.named_modules() if isinstance(layer, FrozenLinear)}
        dense = {name: dense_weight(layer) for name, layer in packed.items()}
        return {f"{name}.weight": w.t() if packed[name].transposed else w for name, w in dense.items()}

    def oracle(self, adapter=None):
        return plain.load(self.folder / "base", self.task, adapter, self.values())


def run(*specs):
    records = Runner().run(list(specs))
    assert [record["error"] for record in records] == [None] * len(specs)
    assert all(record["pack"]["size"] == len(specs) or record["pack"]["why"] for record in records)
    return records


def same_scores(record, scores):
    """val/loss and accuracy are those of the rows."""
    nll, right, targets = (sum(column) for column in zip(*scores, strict=True))
    key = "val/accuracy" if "val/accuracy" in record["metrics"] else "val/token_accuracy"
    assert record["metrics"]["val/loss"] == pytest.approx(nll / targets, rel=1e-4)
    assert record["metrics"][key] == pytest.approx(right / targets, abs=1e-6)


def same_texts(made, model, tokenizer):
    for prompt, text in made:
        assert plain.complete(model, tokenizer, prompt, 40).startswith(text.rstrip("�"))


def same_gradients(ours, theirs):
    """Of what is trained; a head that the checkpoint has is frozen, and PEFT would train it."""
    size = math.sqrt(sum(float(theirs[name].square().sum()) for name in ours if name in theirs))
    for name, given in ours.items():
        grad = theirs.get(name, torch.zeros(()))
        own = torch.zeros_like(grad) if given is None else given
        torch.testing.assert_close(own, grad, atol=2e-4 * size, rtol=1e-3, msg=lambda text, n=name: f"{n}: {text}")

"""One case of the oracle: a checkpoint, its runs, and what transformers and PEFT alone make of it."""

import json
import math

import families
import plain
import pytest
import torch
import transformers
from lightning.pytorch import Callback
from scipy import stats
from tokenizers.processors import TemplateProcessing

from loralab.adapters.lora import LoRA
from loralab.models import loading, pretrained
from loralab.optim.optimizers import AdamW
from loralab.quantization.base import dense_weight
from loralab.quantization.four_bit import FourBit
from loralab.quantization.linear import FrozenLinear
from loralab.quantization.none import NoQuantization
from loralab.running.runner import Runner

STEPS, RATE = 15, 0.01
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
        self.kind = "labels" if task in families.LABELS else "ragged"
        self.losses, self.texts = spied
        paths = {split: rows[self.kind, split] for split in ("train", "validation")}
        if task == "pairs":
            self.tokenizer_folder = framing_pairs(tokenizer_folder, folder / "tokenizer")
        if task in ("pairs", "regression"):
            paths = {split: more_columns(path, folder / path.name, task) for split, path in paths.items()}
        self.paths = {split: str(path) for split, path in paths.items()}
        self.tokenizer = self.model.load_tokenizer()
        names = self.data().as_scores().splits().labels if task == "regression" else self.data().splits().labels
        self.rows = {split: plain.rows(self.tokenizer, path, task, names) for split, path in paths.items()}

    def data(self, **changes):
        given = {**self.paths, **({"text": ["{t}", "{u}"]} if self.task == "pairs" else {}), **changes}
        return self.make_data(self.kind, **given)

    @property
    def model(self):
        task = "sequence_classification" if self.task in families.LABELS else self.task
        more = {"num_labels": 1} if self.task == "regression" else {}
        words = {**more, "task": task, "max_length": 64, "dtype": "float32", "tokenizer": str(self.tokenizer_folder)}
        return pretrained.Pretrained(str(self.folder / "base"), **words)

    def spec(self, name, steps, batch, seed=0, **changes):
        data = self.data(batch_size=batch, generate_rows=0 if self.task in families.LABELS else 3)
        given = {"model": self.model, "data": data, "max_steps": steps, "gradient_clip_val": None, "seed": seed}
        given.update(quantization=QUANTIZERS[self.scheme], optimizer=AdamW(lr=RATE))
        given.update(adapter=LoRA(r=4, lora_alpha=8, target_modules=families.TARGETS.get(self.family, "all-linear")))
        return self.make_spec(name, **{**given, **changes})

    def values(self):
        """{name: value} of the weights that the packed layers stand for."""
        if self.scheme == "dense":
            return {}
        labels = families.LABELS.get(self.task)
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


def framing_pairs(source, folder):
    """The tokenizer, with an end behind each text of a pair and token_type_ids."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A", pair=f"$A {end} $B:1 {end}:1", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def more_columns(path, target, task):
    """The rows with a second text ``u``, or with a real-valued ``y``."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for place, row in enumerate(rows):
        row.update({"u": row["t"][::-1][: 3 + place % 5]} if task == "pairs" else {"y": len(row["t"]) / 4 - place / 8})
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target


def same_regression(record, scores, labels):
    """The mean squared error and both correlations are those of the rows."""
    errors, predictions, _ = zip(*scores, strict=True)
    metrics = record["metrics"]
    assert metrics["val/loss"] == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    assert metrics["val/pearson"] == pytest.approx(stats.pearsonr(predictions, labels)[0], abs=1e-4)
    assert metrics["val/spearman"] == pytest.approx(stats.spearmanr(predictions, labels)[0], abs=1e-4)


def same_scores(record, scores, rows=()):
    """val/loss and accuracy are those of the rows."""
    if "val/pearson" in record["metrics"]:
        same_regression(record, scores, [row[1][0] for row in rows])
        return
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

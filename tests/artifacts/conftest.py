"""Finished runs over bases that lie in folders, so that plain transformers and PEFT can open them too."""

import copy

import pytest
import torch

from loralab.adapters.attached import attached
from loralab.artifacts.reopen import OpenRun
from loralab.cli.main import run
from loralab.models import loading
from loralab.quantization.none import NoQuantization
from loralab.training.generation import evaluating


@pytest.fixture(scope="session")
def base_folder(make_model, tmp_path_factory):
    """The folder of a small random base of one of FAMILIES with its tokenizer, as transformers saves it."""
    made = {}

    def folder(family="llama"):
        if family not in made:
            spec = make_model(family)
            labels = 3 if spec.task == "sequence_classification" else None
            base = loading.load(spec, NoQuantization(), spec.load_tokenizer(), labels)
            made[family] = tmp_path_factory.mktemp(family) / "base"
            base.model.save_pretrained(made[family])
            base.tokenizer.save_pretrained(made[family])
        return made[family]

    return folder


@pytest.fixture(scope="session")
def arguments(base_folder, rows):
    """``key=value`` words of a run of four steps over the base of ``family``."""

    def words(family="llama"):
        classifies = family in ("distilbert", "roberta")
        kind = "labels" if classifies else "pairs"
        task = "sequence_classification" if classifies else "seq2seq_lm" if family == "t5" else "causal_lm"
        return [
            *("model=hf", f"model.name_or_path={base_folder(family)}", f"model.task={task}", "model.max_length=64"),
            *("data=files", "data.batch_size=2"),
            *(("data.text='{t}'", "data.label=y") if classifies else ("data.prompt='{q}'", "data.target='{a}'")),
            *(f"data.{split}={rows[kind, split]}" for split in ("train", "validation")),
            *("logger=none", "trainer=cpu", "trainer.max_steps=4", "callbacks=none", "plan.record=false"),
            "optimizer.lr=0.05",
        ]

    return words


@pytest.fixture(scope="session")
def finished(arguments, tmp_path_factory):
    """The folder of a completed run: (family, further words). Runs are shared: read them, do not change them."""
    made = {}

    def folder(family="llama", *words):
        key = (family, *words)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("run") / "run"
            assert run(["train", *arguments(family), *words, f"hydra.run.dir={made[key]}"]) == 0
        return made[key]

    return folder


@pytest.fixture
def opened(make_spec, make_model, tmp_path):
    """A run that was never trained: its adapter's parameters are moved far from their start.

    (family, adapter's spec, quantizer, further fields of the base's spec) -> the OpenRun; ``base_logits`` of it are the
    base's from before the adapter came.
    """

    def make(family, adapter_spec, quantizer=None, **changes):
        quantizer, model = quantizer or NoQuantization(), make_model(family, **changes)
        classes = {str(place): name for place, name in enumerate(["no", "yes", "maybe"])}
        labels = classes if model.task == "sequence_classification" else {}
        spec = make_spec(family=family, model=model, adapter=adapter_spec, quantization=quantizer)
        base = loading.load(model, quantizer, model.load_tokenizer(), len(labels) or None)
        for name, parameter in base.model.named_parameters():
            if name.endswith("bias"):  # drawn as zeros
                parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
        untouched = copy.deepcopy(base.model) if adapter_spec.changes_base else base.model
        adapter = attached(adapter_spec, base.model, 5)
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for parameter in adapter.parameters():
                size = float(parameter.square().mean().sqrt()) or 0.3
                parameter.add_(0.3 * size * torch.randn(parameter.shape, generator=generator))
        record = {"data": {"id2label": labels, "fingerprint": ""}, "base": base.record()}
        run = OpenRun(tmp_path / "run", record, spec, base, adapter)

        def base_logits(given):
            with evaluating(untouched):
                return untouched(**given).logits

        run.base_logits = base_logits
        return run

    return make

"""Finished runs over bases that lie in folders, so that plain transformers and PEFT can open them too."""

import pytest

from loralab.cli.main import run
from loralab.models import loading
from loralab.quantization.none import NoQuantization


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

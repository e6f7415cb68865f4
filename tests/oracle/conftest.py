"""The tools of a case, by task, family and scheme."""

import pytest

from loralab.training import generation
from loralab.training.module import FineTuner

pytest.register_assert_rewrite("lab")


@pytest.fixture
def spied(monkeypatch):
    """What each row was scored by, where rows come one by one, and what was generated."""
    losses, texts = [], []
    real, told = FineTuner.losses, generation.complete

    def watched(self, batches, training):
        found = real(self, batches, training)
        if not training:
            losses.append({index: (float(nll), batches[index]["rows"]) for index, (nll, _, _) in found.items()})
        return found

    def listened(model, tokenizer, adapter, prompts, *rest, **more):
        made = told(model, tokenizer, adapter, prompts, *rest, **more)
        texts.extend(zip(prompts, made, strict=True))
        return made

    monkeypatch.setattr(FineTuner, "losses", watched)
    monkeypatch.setattr(generation, "complete", listened)
    return losses, texts


@pytest.fixture
def lab(make_spec, make_data, rows, tokenizer_folder, tmp_path, spied):
    """The tools of one case, by task, family and scheme."""

    from lab import Lab

    def make(task, family, scheme="dense", **changes):
        return Lab(task, family, scheme, make_spec, make_data, rows, tokenizer_folder, tmp_path, spied, changes)

    return make

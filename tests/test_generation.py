"""Completions are the same one by one and in a padded batch, and belong to the adapter they are asked of."""

import pytest
import torch

from loralab import generation
from loralab.adapters.lora import LoRA
from loralab.data.base import Row
from loralab.metrics import rouge_l

PROMPTS = ["alpha beta ", "g", "delta epsilon zeta eta "]


@pytest.fixture
def tuned(load_base):
    """A base and an adapter that says something else than the base."""
    base = load_base("llama")
    adapter = LoRA(r=4).attach(base.model, seed=1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.3)
    return base, adapter


def complete(base, adapter, prompts, room=8):
    return generation.complete(base.model, base.tokenizer, adapter, prompts, base.spec.task, room, 64)


def test_a_batch_gives_what_each_prompt_gives_alone(tuned):
    base, adapter = tuned
    assert complete(base, adapter, PROMPTS) == [complete(base, adapter, [prompt])[0] for prompt in PROMPTS]


def test_the_adapter_speaks_and_without_it_the_base(tuned):
    base, adapter = tuned
    assert complete(base, adapter, PROMPTS) != complete(base, None, PROMPTS)
    bare = complete(base, None, PROMPTS)
    adapter.detach()
    assert complete(base, None, PROMPTS) == bare


def test_a_model_keeps_the_mode_it_had(tuned):
    base, adapter = tuned
    base.model.train()
    complete(base, adapter, PROMPTS[:1])
    assert base.model.training


def test_a_long_prompt_is_cut_from_the_left(tuned):
    base, adapter = tuned
    long = "x" * 200 + "alpha beta "
    assert complete(base, adapter, [long]) == complete(base, adapter, [long[-56:]])


def test_seq2seq_completes_too(load_base):
    base = load_base("t5")
    made = complete(base, LoRA(r=2).attach(base.model), PROMPTS)
    assert len(made) == 3


def test_rouge_l_of_equal_texts_is_one_and_of_strangers_zero():
    assert rouge_l(["a b c"], ["a b c"]) == pytest.approx(1.0)
    assert rouge_l(["a b c"], ["d e f"]) == 0.0
    assert rouge_l(["a b c d"], ["a c"]) == pytest.approx(2 * 0.5 * 1.0 / 1.5)  # longest common: a c


def test_the_score_is_the_mean_over_rows(tuned):
    base, adapter = tuned
    rows = [Row(prompt, target="alpha beta") for prompt in PROMPTS]
    assert 0.0 <= generation.score(base.model, base.tokenizer, adapter, rows, "causal_lm", 64) <= 1.0

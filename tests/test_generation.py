"""Completions of a padded batch are those of each prompt alone."""

import pytest
import torch

from loralab.adapters.lora import LoRA
from loralab.data.base import Row
from loralab.generation import complete, evaluating, score
from loralab.metrics import rouge_l

PROMPTS = ["a", "some more words", "four", "a prompt of quite another length"]


def moved(base):
    adapter = LoRA(r=4).attach(base.model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, delta in adapter.adapted():
            delta.lora_B.copy_(torch.randn(delta.lora_B.shape, generator=generator))
    return adapter


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_padding_changes_no_completion(load_base, family):
    base = load_base(family)
    adapter, task = moved(base), base.spec.task
    together = complete(base.model, base.tokenizer, adapter, PROMPTS, task, 8, 64)
    apart = [complete(base.model, base.tokenizer, adapter, [one], task, 8, 64)[0] for one in PROMPTS]
    assert together == apart
    assert together != complete(base.model, base.tokenizer, None, PROMPTS, task, 8, 64)


def test_a_long_prompt_is_cut_from_the_left(load_base):
    base = load_base()
    long = complete(base.model, base.tokenizer, None, ["x" * 500 + "tail of it"], "causal_lm", 8, 18)
    assert long == complete(base.model, base.tokenizer, None, ["tail of it"], "causal_lm", 8, 18)


def test_generating_leaves_the_mode_of_the_base_as_it_was(load_base):
    model = load_base().model
    for training in (True, False):
        model.train(training)
        with evaluating(model):
            assert not model.training
            assert not torch.is_grad_enabled()
        assert model.training is training


def test_a_detached_adapter_leaves_the_bare_base(load_base):
    base = load_base()
    bare = complete(base.model, base.tokenizer, None, PROMPTS, "causal_lm", 8, 64)
    adapter = moved(base)
    assert complete(base.model, base.tokenizer, None, PROMPTS, "causal_lm", 8, 64) == bare
    adapter.detach()
    assert complete(base.model, base.tokenizer, adapter, PROMPTS, "causal_lm", 8, 64) == bare


def test_the_score_is_the_mean_rouge_l_of_the_completions_over_all_batches(load_base):
    base = load_base()
    adapter = moved(base)
    targets = ["alpha beta", "gamma", "delta", "x" * 40]
    made = complete(base.model, base.tokenizer, adapter, PROMPTS, "causal_lm", 32, 64)  # room is half the length
    targets[2] = made[2][:10]  # one that is partly right, so that the mean is not zero
    rows = [Row(prompt, target=target) for prompt, target in zip(PROMPTS, targets, strict=True)]
    expected = rouge_l(made, targets)
    assert score(base.model, base.tokenizer, adapter, rows, "causal_lm", 64, batch_size=3) == pytest.approx(expected)

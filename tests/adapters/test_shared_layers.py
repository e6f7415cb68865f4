"""A layer that the base calls several times in a pass (ALBERT repeats one) is adapted each time, with its own mask."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from loralab.adapters.hooks import AdapterHooks, BatchSlice
from loralab.adapters.lora import LoRA, LoRADelta

ALBERT = {"model_type": "albert", "embedding_size": 16, "max_position_embeddings": 64, "num_hidden_layers": 3}


@pytest.fixture
def adapted(load_base):
    """An ALBERT of three repetitions in training mode, and a LoRA with dropout on it."""
    base = load_base("roberta", config=ALBERT)
    base.model.train()
    return base.model, LoRA(r=4, lora_dropout=0.5, target_modules=["query"]).attach(base.model, seed=1)


def test_each_repetition_draws_a_mask_of_its_own_and_a_pass_with_the_same_key_the_same(adapted, monkeypatch):
    model, adapter = adapted
    keys = []
    real = LoRADelta.forward_grouped

    def watched(x, y, slices):
        keys.extend(key for *_, key in slices)
        return real(x, y, slices)

    monkeypatch.setattr(LoRADelta, "forward_grouped", staticmethod(watched))
    for _ in range(2):
        with AdapterHooks.of(model).batch(BatchSlice(adapter, 1, 5)):
            model(input_ids=torch.arange(2, 12)[None])
    assert len(set(keys[:3])) == 3
    assert keys[3:] == keys[:3]
    with AdapterHooks.of(model).batch(BatchSlice(adapter, 1, None)):
        model(input_ids=torch.arange(2, 12)[None])
    assert keys[6:] == [None] * 3


def test_a_recomputed_repetition_draws_its_own_mask_again():
    model = nn.Sequential(nn.Linear(20, 20, bias=False))
    delta = LoRADelta(20, 20, 4, 1.0, dropout=0.5)
    for parameter in delta.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    hooks, owner = AdapterHooks.of(model), nn.Identity()
    hooks.attach(model, "0", owner, delta)
    gradients = []
    for checkpointing in (False, True):
        x = torch.ones(2, 20, requires_grad=True)
        y = x
        with hooks.batch(BatchSlice(owner, 2, 5)):
            for _ in range(3):
                y = checkpoint(model, y, use_reentrant=False, context_fn=hooks.replayed) if checkpointing else model(y)
            gradients.append(torch.autograd.grad(y.square().sum(), [x, *delta.parameters()]))
    for own, other in zip(*gradients, strict=True):
        assert float(own.abs().max()) > 0
        torch.testing.assert_close(own, other)

"""Attention in one call over rows of unequal lengths, by a stand-in of torch's kernel, which a CPU does not have."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig

from loralab.adapters.hooks import BatchSlice
from loralab.adapters.lora import LoRA
from loralab.forward import varlen
from loralab.forward.stacked import Forward, ForwardMode, unpads


@pytest.fixture
def kernel(monkeypatch):
    """Calls of the stand-in, which computes each row by SDPA."""
    calls = []

    def attend(
        query, key, value, ends, ends_k, longest, longest_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
    ):
        calls.append(ends.tolist())
        assert ends is ends_k
        assert ends.dtype == torch.int32
        assert longest == longest_k == max(ends.diff())
        assert window_size == (-1, 0)
        rows = []
        for begin, end in pairwise(ends.tolist()):
            q, k, v = (x[begin:end].transpose(0, 1) for x in (query, key, value))
            rows.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa))
        return torch.cat(rows, 1).transpose(0, 1)

    monkeypatch.setattr(varlen, "_kernel", lambda: attend)
    monkeypatch.setattr(varlen, "DEVICES", {"cpu"})
    monkeypatch.setattr(varlen, "DTYPES", {torch.float32})
    return calls


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_losses_and_gradients_are_those_of_each_row_by_itself(load_base, kernel, monkeypatch, family):
    base = load_base(family, "nf4")
    adapters = [LoRA(r=r, lora_dropout=dropout).attach(base.model, seed=r) for r, dropout in ((2, 0.2), (4, 0.0))]
    for _, delta in adapters[0].adapted():
        torch.nn.init.normal_(delta.lora_B, std=0.02)
    base.model.train()
    ids = torch.randint(2, 60, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[int(place < length) for place in range(12)] for length in (12, 5, 9)])

    def scored():
        forward = Forward(base.model, base.spec.task)
        slices = [BatchSlice(adapters[0], 1, 5), BatchSlice(adapters[1], 2, 6)]
        scores = forward({"input_ids": ids, "attention_mask": mask}, ids.masked_fill(mask == 0, -100), slices)
        assert forward.mode == ForwardMode(unpadded=True, fused_cross_entropy=True)
        losses = [loss for loss, _, _ in scores]
        return losses, torch.autograd.grad(sum(losses), [p for one in adapters for p in one.parameters()])

    ours, our_gradients = scored()
    assert kernel[-1] == [0, 12, 17, 26]
    monkeypatch.setattr(varlen, "DEVICES", set())
    kernel.clear()
    theirs, gradients = scored()
    assert not kernel
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_gradients, gradients)


def test_fewer_heads_of_keys_are_given_as_they_are_or_repeated_for_a_torch_that_cannot(kernel, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 9, 8, generator=generator) for heads in (4, 2, 2))
    given = varlen.attend(q, k, v, [4, 5], None)
    real = varlen._kernel()

    def older(query, key, value, ends, ends_k, longest, longest_k, is_causal=False, *, scale=None):
        assert is_causal
        assert key.shape[1] == query.shape[1]
        return real(query, key, value, ends, ends_k, longest, longest_k, scale=scale, window_size=(-1, 0))

    monkeypatch.setattr(varlen, "_kernel", lambda: older)
    repeated = varlen.attend(q, k, v, [4, 5], None)
    wide = (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    parts = [[x[:, :, part] for x in wide] for part in (slice(0, 4), slice(4, 9))]
    rows = [F.scaled_dot_product_attention(*part, is_causal=True) for part in parts]
    torch.testing.assert_close(given, torch.cat(rows, 2).transpose(1, 2))
    torch.testing.assert_close(given, repeated)


@pytest.mark.parametrize(
    ("changes", "dtype", "capability", "expected"),
    [
        ({}, torch.bfloat16, None, True),
        ({}, torch.bfloat16, (9, 0), True),
        ({}, torch.float16, (7, 5), False),
        ({}, torch.float32, (9, 0), False),
        ({"head_dim": 20}, torch.bfloat16, (9, 0), False),
        ({"head_dim": 512}, torch.bfloat16, (9, 0), False),
        ({"attention_dropout": 0.1}, torch.bfloat16, (9, 0), False),
    ],
)
def test_padding_is_left_out_on_a_card_where_its_kernel_takes_the_heads(
    monkeypatch, changes, dtype, capability, expected
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, **changes)
    assert unpads(config, "cuda", dtype) is expected
    assert unpads(config, "cuda", dtype, packing=True)
    assert unpads(config, "cpu", dtype)

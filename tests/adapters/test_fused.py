"""The fused update is autograd's, with less kept."""

import pytest
import torch
import torch.nn.functional as F

from loralab.adapters.dropout import keyed_dropout
from loralab.adapters.fused import lora_update
from loralab.adapters.hooks import AdapterHooks, BatchSlice
from loralab.adapters.lora import LoRADelta
from loralab.adapters.runs import Part

PARTS = [Part(0, 6, 2.0, 0.0, None), Part(6, 15, 0.5, 0.3, 7)]


def factors(dtype=torch.float64, ranks=(2, 3), width=5, out=4):
    drawn = torch.Generator().manual_seed(0)
    shapes = [shape for r in ranks for shape in ((r, width), (out, r))]
    return [torch.randn(*s, generator=drawn, dtype=dtype).requires_grad_() for s in shapes]


def plain(x, y, parts, given):
    """What autograd makes of the same sum, part by part."""
    flat, rows = x.reshape(-1, x.shape[-1]), list(y.reshape(-1, y.shape[-1]).split(1))
    for part, a, b in zip(parts, given[::2], given[1::2], strict=True):
        own = keyed_dropout(flat[part.start : part.stop], part.dropout, part.key)
        update = part.scaling * F.linear(F.linear(own, a), b)
        rows[part.start : part.stop] = [rows[part.start + i] + update[i : i + 1] for i in range(len(update))]
    return torch.cat(rows).view(y.shape)


def test_gradients_are_right_to_double_precision():
    x = torch.randn(5, 3, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, y, *f: lora_update(x, y * 1.0, PARTS, f), (x, y, *factors()))


@pytest.mark.parametrize("parts", [PARTS, PARTS[:1], PARTS[1:]], ids=["both", "first", "second"])
def test_outputs_and_gradients_are_autograds(parts):
    given = factors(torch.float32)[: 2 * len(parts)]
    results = []
    for update in (lora_update, plain):
        x = torch.linspace(-1, 1, 75).view(5, 3, 5).requires_grad_()
        y = torch.linspace(-2, 2, 60).view(5, 3, 4)
        out = update(x, y.clone(), parts, given)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *given])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_rows_of_nobody_are_left_as_they_are_and_pass_no_gradient():
    x, y = torch.randn(20, 5, requires_grad=True), torch.randn(20, 4)
    out = lora_update(x, y.clone(), PARTS, factors(torch.float32))
    assert torch.equal(out[15:], y[15:])
    out.sum().backward()
    assert x.grad[:15].abs().sum() > 0
    assert not x.grad[15:].any()


def test_it_keeps_the_input_and_the_inner_product_and_nothing_as_wide_as_the_output():
    x = torch.randn(64, 16)
    delta = LoRADelta(16, 32, r=2, scaling=1.0, dropout=0.5)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        delta(x, torch.randn(64, 32), 3)
    own = [t for t in kept if t is not delta.lora_A and t is not delta.lora_B]
    assert sorted(tuple(t.shape) for t in own) == [(64, 2), (64, 16)]
    assert any(t.data_ptr() == x.data_ptr() for t in own)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_has_the_bases_dtype_and_is_close_in_half_precision(dtype, autocast):
    delta = LoRADelta(16, 8, r=4, scaling=2.0)
    torch.nn.init.normal_(delta.lora_A)
    torch.nn.init.normal_(delta.lora_B)
    x, y = torch.randn(6, 16), torch.randn(6, 8)
    exact = y + 2.0 * x @ delta.lora_A.T @ delta.lora_B.T
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = delta(x.to(dtype), y.to(dtype), None)
    assert out.dtype == dtype
    assert float((out - exact).norm() / exact.norm()) < (0.02 if autocast or dtype == torch.bfloat16 else 1e-6)
    out.float().sum().backward()
    assert delta.lora_A.grad.dtype == torch.float32


def test_dropout_is_drawn_again_as_it_was_in_half_precision():
    x = torch.randn(8, 64).bfloat16().requires_grad_()
    delta = LoRADelta(64, 4, r=2, scaling=1.0, dropout=0.5)
    torch.nn.init.ones_(delta.lora_A)
    torch.nn.init.ones_(delta.lora_B)
    delta(x, torch.zeros(8, 4).bfloat16(), 11).float().sum().backward()
    dropped = keyed_dropout(torch.ones(8, 64).bfloat16(), 0.5, 11) == 0
    assert torch.equal(x.grad == 0, dropped)


def test_a_view_given_as_the_output_is_not_written_to():
    base = torch.zeros(4, 6)
    delta = LoRADelta(3, 6, r=1, scaling=1.0)
    torch.nn.init.ones_(delta.lora_A)
    torch.nn.init.ones_(delta.lora_B)
    lora_update(torch.ones(4, 3), base.view(2, 2, 6), [Part(0, 4, 1.0, 0.0, None)], [delta.lora_A, delta.lora_B])
    assert not base.any()


def test_a_flat_batch_is_split_by_tokens():
    layer = torch.nn.Module()
    layer.inner = torch.nn.Linear(3, 2, bias=False)
    hooks = AdapterHooks.of(layer)
    owners = [torch.nn.Module(), torch.nn.Module()]
    deltas = [LoRADelta(3, 2, r=1, scaling=s) for s in (1.0, 5.0)]
    for owner, delta in zip(owners, deltas, strict=True):
        torch.nn.init.ones_(delta.lora_A)
        torch.nn.init.ones_(delta.lora_B)
        hooks.attach(layer, "inner", owner, delta)
    hooks.begin_pass((BatchSlice(owners[0], 1, None, 2), BatchSlice(owners[1], 2, None, 5)))
    x = torch.ones(1, 7, 3)
    update = layer.inner(x) - F.linear(x, layer.inner.weight)
    torch.testing.assert_close(update[0, :, 0], torch.tensor([3.0, 3, 15, 15, 15, 15, 15]))

"""What a shadow shows is what its buffer holds, whatever changed it; and it is cast once a pass."""

import gc

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from loralab.numerics.shadows import Shadowed, in_dtype
from loralab.numerics.stacks import stacked

ROWS, SHAPES = 3, [(4, 8), (16, 4), (8,)]


@pytest.fixture
def buffer():
    """(the buffer, its parameters by row, what shadows it)."""
    values = torch.empty(ROWS, sum(nn.Parameter(torch.empty(s)).numel() for s in SHAPES))
    rows = []
    for own in values:
        parts = own.split([torch.Size(s).numel() for s in SHAPES])
        rows.append([nn.Parameter(torch.randn(s)) for s in SHAPES])
        for parameter, part in zip(rows[-1], parts, strict=True):
            parameter.data = part.view(parameter.shape).copy_(parameter.detach())
    return values, rows, Shadowed(values, [p for row in rows for p in row])


class Casts(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default
        return function(*args, **(kwargs or {}))


def sites_of(rows):
    return [list(site) for site in zip(*rows, strict=True)][:2]


def shown(rows):
    """Every site's stack and a parameter of each, in bfloat16."""
    stacks = [in_dtype(stacked(site), torch.bfloat16, site) for site in sites_of(rows)]
    return stacks + [in_dtype(site[1], torch.bfloat16, [site[1]]) for site in sites_of(rows)]


def held(rows):
    return [torch.stack(site).bfloat16() for site in sites_of(rows)] + [site[1].bfloat16() for site in sites_of(rows)]


def load(values, rows):
    module = nn.Linear(8, 4, bias=False)
    module.weight = rows[1][0]
    module.load_state_dict({"weight": torch.randn(4, 8)})


CHANGES = {
    "copy_": lambda values, rows: rows[1][0].copy_(torch.randn(4, 8)),
    "load_state_dict": load,
    "an update of the buffer": lambda values, rows: values.mul_(1.5),
    "an optimizer": lambda values, rows: torch.optim.SGD([rows[1][1]], lr=1.0).step(),
    "set to a part": lambda values, rows: rows[1][1][2:3].fill_(7.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_no_change_is_missed(buffer, change):
    values, rows, _ = buffer
    before = shown(rows)
    for row in rows:
        row[1].grad = torch.ones_like(row[1])
    with torch.no_grad():
        CHANGES[change](values, rows)
    found = shown(rows)
    assert any(not torch.equal(a, b) for a, b in zip(before, found, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found, held(rows), strict=True))


def test_weights_that_are_exchanged_without_a_trace_are_seen_in_the_next_pass(buffer):
    _, rows, _ = buffer
    shown(rows)
    rows[1][0].data.copy_(torch.randn(4, 8))
    Shadowed.begin_pass()
    assert all(torch.equal(a, b) for a, b in zip(shown(rows), held(rows), strict=True))


def test_a_pass_casts_once_and_makes_views(buffer):
    rows = buffer[1]
    with Casts() as casts:
        found = shown(rows) + shown(rows)
        assert casts.count == 1
        assert len({view.untyped_storage().data_ptr() for view in found}) == 1
        Shadowed.begin_pass()
        again = shown(rows)
    assert casts.count == 2
    assert again[0].untyped_storage().data_ptr() != found[0].untyped_storage().data_ptr()  # a graph may hold the other
    assert all(view.dtype == torch.bfloat16 and not view.requires_grad for view in found)
    assert in_dtype(rows[0][0], torch.float32, [rows[0][0]]) is rows[0][0]


def test_a_copy_made_in_a_validation_can_be_trained_with(buffer):
    _, rows, _ = buffer
    with torch.inference_mode():
        shown(rows)
    x = torch.randn(3, 5, 8, dtype=torch.bfloat16, requires_grad=True)
    (x @ shown(rows)[0].transpose(1, 2)).sum().backward()
    assert x.grad is not None


def test_what_is_no_part_or_begins_at_an_odd_place_is_cast_by_itself(buffer):
    rows = buffer[1]
    odd = torch.randn(2, 35)[:, 3:].view(2, 4, 8)
    kept = Shadowed(odd._base, [odd[0], odd[1]])
    with Casts() as casts:
        for stack in (stacked([rows[0][0], rows[2][0], rows[1][0]]), torch.randn(3, 4, 8), odd):
            assert torch.equal(in_dtype(stack, torch.bfloat16, [stack]), stack.bfloat16())
        rows[0][0].data = torch.randn(4, 8)  # moved elsewhere
        assert torch.equal(in_dtype(rows[0][0], torch.bfloat16, [rows[0][0]]), rows[0][0].bfloat16())
    assert casts.count == 8
    assert kept is Shadowed.over(odd)


def test_nothing_is_shadowed_any_more_once_its_owner_is_gone():
    values = torch.randn(2, 32)
    parts = [values[0].view(4, 8), values[1].view(4, 8)]
    shadowed = Shadowed(values, parts)
    assert Shadowed.over(parts[0]) is shadowed
    del shadowed
    gc.collect()
    assert Shadowed.over(parts[0]) is None

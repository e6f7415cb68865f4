"""What processes that train one trial share: rows, dropout masks and scores are those of one process, cut apart."""

import numpy as np
import pytest
import torch

from loralab.adapters.dropout import Share, dropped, length_of
from loralab.adapters.hooks import BatchSlice
from loralab.running.inputs import Inputs
from loralab.training import together
from loralab.training.cursor import DataCursor


@pytest.fixture
def cursors(make_spec):
    """The cursor of one process, and those of ``size`` that share its batches of four."""

    def make(size, packing=None, kind="ragged"):
        spec = make_spec(kind=kind)
        data = Inputs().rows(spec)
        given = (data, "causal_lm", 0, 5, 4, 2, packing)
        return data, DataCursor(*given), [DataCursor(*given, (rank, size)) for rank in range(size)]

    return make


@pytest.mark.parametrize("packing", [None, 64], ids=["rows", "packed"])
@pytest.mark.parametrize("size", [2, 4])
def test_the_shares_of_a_batch_are_its_rows_in_their_order(cursors, size, packing):
    _, whole, shares = cursors(size, packing)
    for step in (0, 3):
        for cursor in (whole, *shares):
            cursor.seek(step)
        for batch, *parts in zip(whole.step_batches(), *(share.step_batches() for share in shares), strict=True):
            assert [row for part in parts for row in part["chosen"]] == batch["chosen"]
            assert {part["step_targets"] for part in parts} == {batch["step_targets"]}
            assert {part["tokens"] for part in parts} == {batch["tokens"]}
            before = np.cumsum([0, *(part["rows"] for part in parts)])
            assert [part["share"].rows_before for part in parts] == before[:-1].tolist()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_row_is_scored_once_and_by_one_process(cursors, size):
    data, whole, shares = cursors(size)
    rounds = [list(cursor.evaluation_batches(data.validation, 4)) for cursor in (whole, *shares)]
    assert len(data.validation) % 4
    for batch, *parts in zip(*rounds, strict=True):
        assert [row for part in parts if part for row in part["chosen"]] == batch["chosen"]


@pytest.mark.parametrize(("shape", "flat"), [((6, 5, 8), False), ((1, 30, 8), True), ((6, 8), False)])
@pytest.mark.parametrize("sizes", [(2, 4), (1, 5), (1,) * 6])
def test_the_masks_of_the_shares_are_the_mask_of_the_batch(shape, flat, sizes):
    x, key = torch.ones(shape), 1234
    owner = torch.nn.Identity()
    unit, dim = (5, 1) if flat else (1, 0)
    whole = dropped(x, 0.5, [(x.numel(), BatchSlice(owner, 6, key).mixed(7))], length_of(x))
    parts, before = [], 0
    for rows in sizes:
        share = Share(before, 6, 5 * before, 30)
        part = BatchSlice(owner, rows, key, 5 * rows if flat else None, share)
        given = x.narrow(dim, before * unit, rows * unit)
        parts.append(dropped(given, 0.5, [(given.numel(), part.mixed(7))], length_of(given)))
        before += rows
    assert torch.equal(torch.cat(parts, dim), whole)
    assert 0 < int((whole == 0).sum()) < whole.numel()


def test_alone_nothing_is_exchanged_and_nothing_changed():
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    together.add_gradients([parameter])
    value = torch.tensor(1.0)
    assert together.total(value) is value
    assert (together.rank_and_size(), together.gathered(3), together.first(3)) == ((0, 1), [3], 3)
    assert torch.equal(parameter.grad, torch.ones(2))

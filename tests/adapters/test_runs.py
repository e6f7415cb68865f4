"""LoRA's products of all trials of a pass together are those of one trial after the other, in fewer operations."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loralab.adapters import dropout, fused
from loralab.adapters.fused import lora_update
from loralab.adapters.low_rank import PiSSADelta
from loralab.adapters.products import Batched, OneByOne, Ragged
from loralab.adapters.runs import Part, runs_of
from loralab.numerics.stacks import side_by_side, stacked

WIDTH, OUT = 16, 24


@pytest.fixture
def together(monkeypatch):
    """The form of a card, on this CPU, and one trial after the other with a card's masks."""
    monkeypatch.setattr(dropout, "COUNTED", {"cpu"})

    def switch(on):
        monkeypatch.setattr(fused, "TOGETHER", {"cpu"} if on else set())

    return switch


def parts_of(lengths, rates=()):
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    drops = rates or [0.0] * len(lengths)
    return [
        Part(start, start + n, 10.0 / (3 + i), p, 100 + i if p else None)
        for i, (start, n, p) in enumerate(zip(starts, lengths, drops, strict=True))
    ]


def factors_of(ranks, dtype):
    drawn = torch.Generator().manual_seed(0)
    shapes = [shape for r in ranks for shape in ((r, WIDTH), (OUT, r))]
    return [torch.randn(*shape, generator=drawn, dtype=dtype).requires_grad_() for shape in shapes]


def computed(parts, given, dtype, passes=1, spoil=None, base=None, exact=False):
    """[y, dx, gradients of the factors] after ``passes`` passes that add up; ``spoil``: a position that is NaN;
    ``exact``: of the numbers of ``base``, in ``dtype``."""
    drawn, results = torch.Generator().manual_seed(1), []
    count = parts[-1].stop + 2  # the last two belong to nobody
    for factor in given:
        factor.grad = None
    for _ in range(passes):
        x = torch.randn(1, count, WIDTH, generator=drawn, dtype=dtype)
        y, dy = (torch.randn(1, count, OUT, generator=drawn, dtype=base or dtype) for _ in range(2))
        if spoil is not None:
            x[0, spoil, 0] = float("nan")
        x = x.to(base or dtype)
        if exact:
            x, y, dy = x.to(dtype), y.to(dtype), dy.to(dtype)
        x.requires_grad_()
        out = lora_update(x, y, parts, given)
        out.backward(dy)
        results = [out.detach(), x.grad]
    return [*results, *(factor.grad for factor in given)]


LENGTHS = {"equal": [6, 6, 6, 6], "ragged": [5, 9, 2, 8]}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("rates", [(), (0.3,) * 4, (0.3, 0.0, 0.5, 0.0)], ids=["plain", "dropped", "mixed"])
@pytest.mark.parametrize("ranks", [(8, 8, 8, 8), (2, 2, 8, 8), (3, 1, 8, 3)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)], ids=["64", "32"])
def test_together_is_one_after_the_other(together, lengths, rates, ranks, dtype, tolerance):
    parts, given = parts_of(LENGTHS[lengths], rates), factors_of(ranks, dtype)
    results = []
    for on in (False, True):
        together(on)
        results.append(computed(parts, given, dtype, passes=2))
    for one, all_at_once in zip(*results, strict=True):
        torch.testing.assert_close(all_at_once, one, rtol=tolerance, atol=tolerance)


def test_ranks_and_lengths_say_which_products_are_made():
    def forms(lengths, ranks, dtype=torch.float32):
        return [(len(run.parts), type(run.form)) for run in runs_of(parts_of(lengths), factors_of(ranks, dtype), dtype)]

    assert forms([6] * 4, (8, 8, 2, 2)) == [(2, Batched), (2, Batched)]
    assert forms([5, 9, 2, 8], (8, 8, 8, 2)) == [(3, Ragged), (1, OneByOne)]
    assert forms([5, 9], (8, 8), torch.float64) == [(2, OneByOne)]  # which grouped_mm does not take
    apart = [Part(0, 4, 1.0, 0.0, None), Part(6, 10, 1.0, 0.0, None)]
    assert len(runs_of(apart, factors_of((8, 8), torch.float32), torch.float32)) == 2


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_under_autocast_it_differs_from_exact_products_as_much_as_one_after_the_other(together, lengths, base):
    parts, given = parts_of(LENGTHS[lengths], (0.3,) * 4), factors_of((8, 8, 4, 4), torch.float32)
    exact, errors = computed(parts, given, torch.float32, base=base, exact=True), []
    for on in (False, True):
        together(on)
        with torch.autocast("cpu", torch.bfloat16):
            found = computed(parts, given, torch.float32, base=base)
        assert [t.dtype for t in found] == [base, base] + [torch.float32] * len(given)
        errors.append([float((a - b).float().norm() / b.float().norm()) for a, b in zip(found, exact, strict=True)])
    assert max(errors[1]) < 0.02
    assert max(errors[1]) < 1.5 * max(errors[0])


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("ranks", [(8, 8, 8, 8), (3, 3, 3, 3)], ids=str)
def test_what_is_not_finite_in_one_trial_touches_no_other(together, lengths, ranks):
    parts, given = parts_of(LENGTHS[lengths]), factors_of(ranks, torch.float32)
    together(True)
    clean = computed(parts, given, torch.float32)
    spoiled = computed(parts, given, torch.float32, spoil=parts[1].start)
    with torch.no_grad():
        given[2][0, 0] = float("inf")  # A of the second
    worse = computed(parts, given, torch.float32, spoil=parts[1].start)
    own = slice(parts[1].start, parts[1].stop)
    for found in (spoiled, worse):
        assert not found[0][0, own].isfinite().all()
        assert not found[4].isfinite().all()
        for part in (parts[0], *parts[2:]):
            for before, after in zip(clean[:2], found[:2], strict=True):
                assert torch.equal(before[0, part.start : part.stop], after[0, part.start : part.stop])
        for i in (0, 1, 4, 5, 6, 7):
            assert torch.equal(clean[2 + i], found[2 + i])


def test_frozen_factors_get_no_gradient_and_pissa_starts_at_the_base(together):
    together(True)
    deltas = [PiSSADelta(WIDTH, OUT, r, 0.5, dropout=0.2) for r in (4, 4, 2)]
    for delta in deltas:
        delta.begin(torch.randn_like(delta.lora_A), torch.randn_like(delta.lora_B))
    x, y = torch.randn(12, WIDTH), torch.randn(12, OUT)
    slices = [(4 * i, 4 * i + 4, delta, None) for i, delta in enumerate(deltas)]
    assert torch.equal(PiSSADelta.forward_grouped(x, y, slices), y)
    keyed = [(start, stop, delta, 7) for start, stop, delta, _ in slices]
    PiSSADelta.forward_grouped(x, y, keyed).sum().backward()
    assert all(delta.lora_A.grad is not None and delta.initial_A.grad is None for delta in deltas)


class Operations(TorchDispatchMode):
    """Counts the operators that are called, without those that only make a view."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returned = [one.alias_info for one in function._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in returned):
            self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def operations(trials, lengths, rates=(), passes=1):
    parts = parts_of(lengths, rates)
    given = factors_of((8,) * trials, torch.float32)
    computed(parts, given, torch.float32)  # what is made once for these lengths
    with Operations() as seen:
        computed(parts, given, torch.float32, passes=passes)
    return seen.counts.total()


@pytest.mark.parametrize(
    "lengths", [lambda k: [4] * k, lambda k: [4 + i % 3 for i in range(k)]], ids=["equal", "ragged"]
)
@pytest.mark.parametrize("passes", [1, 2])
def test_the_operations_of_a_layer_do_not_grow_with_the_trials(together, lengths, passes):
    counts = {}
    for on in (False, True):
        together(on)
        counts[on] = [operations(k, lengths(k), passes=passes) for k in (2, 4, 16)]
    assert len(set(counts[True])) == 1, counts
    assert counts[False][2] - counts[False][1] >= 12 * 6, counts


@pytest.mark.parametrize("rates", [(0.1, 0.1, 0.1), (0.1, 0.3, 0.0)], ids=["alike", "mixed"])
def test_a_mask_costs_ten_operations_however_many_trials_draw_it(together, rates):
    """A layer's, forward and backward; a generator for each trial took 31 of one, 62 of four, 170 of sixteen in all."""
    together(True)
    trials = (1, 4, 16)
    dry, wet = ([operations(k, [4] * k, drawn[:k]) for k in trials] for drawn in ((0.0,) * 16, (rates * 6)[:16]))
    assert dry == [12, 16, 16]
    assert wet == [22, 26, 26]


def test_a_stack_of_what_lies_side_by_side_is_a_view():
    memory = torch.arange(60.0).view(3, 20)
    rows = [row[4:10].view(2, 3) for row in memory]
    joined = stacked(rows)
    assert torch.equal(joined, memory[:, 4:10].view(3, 2, 3))
    assert joined.data_ptr() == rows[0].data_ptr()
    for apart in ([rows[0], rows[2], rows[1]], [rows[0], torch.zeros(2, 3)], [rows[0], rows[0]], [r.t() for r in rows]):
        assert side_by_side(apart) is None
        assert torch.equal(stacked(apart), torch.stack(apart))

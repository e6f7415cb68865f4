"""A card's dropout masks: random as they should be, and each trial's its own, whoever shares the pass."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.checkpoint import checkpoint

from loralab.adapters import dropout, fused
from loralab.adapters.dropout import Share, dropped, keyed_dropout
from loralab.adapters.fused import lora_update
from loralab.adapters.hooks import BatchSlice
from loralab.adapters.masks import MaskKey, kept
from loralab.adapters.runs import Part

WIDTH = 96


@pytest.fixture
def counted(monkeypatch):
    """What a card does, on this CPU."""
    monkeypatch.setattr(dropout, "COUNTED", {"cpu"})
    monkeypatch.setattr(fused, "TOGETHER", {"cpu"})


def mask(key, p=0.5, positions=512, width=WIDTH, length=1):
    return kept([positions], [key], [p], length, torch.empty(positions, width))


@pytest.mark.parametrize("p", [0.01, 0.05, 0.1, 0.3, 0.5, 0.9])
def test_the_share_that_is_dropped_is_the_one_asked_for(p):
    for key in range(4):
        found = mask(MaskKey(key, (5,)), p, 2048, 256)
        assert stats.binomtest(int((~found).sum()), found.numel(), p).pvalue > 1e-3
        for dim in (0, 1):  # no position and no column of its own rate
            counts = (~found).sum(dim).numpy()
            spread = ((counts - p * found.shape[dim]) ** 2 / (found.shape[dim] * p * (1 - p))).sum()
            assert 1e-4 < stats.chi2.sf(spread, len(counts)) < 1 - 1e-4


@pytest.mark.parametrize("apart", [1, 4, WIDTH, 4 * WIDTH], ids=["columns", "words", "positions", "fourth positions"])
def test_eight_elements_are_dropped_in_every_pattern_as_often(apart):
    flat = mask(MaskKey(3, (1, 2)), positions=4096).flatten().numpy().astype(np.int64)
    starts = np.arange(len(flat) - 7 * apart).reshape(-1)[:: 1 if apart > 1 else 8]
    starts = starts[(starts // apart) % 8 == 0]  # no element twice
    patterns = sum(flat[starts + i * apart] << i for i in range(8))
    assert len(patterns) > 40_000
    assert 1e-3 < stats.chisquare(np.bincount(patterns, minlength=256)).pvalue < 1 - 1e-3


def test_four_corners_of_a_rectangle_know_nothing_of_each_other():
    """A position's number and a column's are added before they are hashed."""
    signs = 2.0 * mask(MaskKey(3, (1,)), positions=2048).double() - 1
    for rows, columns in ((1, 4), (1, 8), (5, 4), (64, 32)):
        corners = signs[:-rows, :-columns] * signs[rows:, :-columns] * signs[:-rows, columns:] * signs[rows:, columns:]
        assert abs(float(corners.sum())) / corners.numel() ** 0.5 < 4


OTHERS = {
    "trials": [MaskKey(trial, (9,)) for trial in range(40)],
    "places": [MaskKey(1, (place,)) for place in range(40)],
    "calls": [MaskKey(1, (9, call)) for call in range(40)],
    "steps": [MaskKey((1 << 20) + 2 * step, (9,)) for step in range(40)],
    "plain keys": list(range(40)),
}


@pytest.mark.parametrize("others", OTHERS)
def test_masks_of_other_keys_have_nothing_in_common(others):
    signs = np.stack([2.0 * mask(key).numpy().ravel() - 1 for key in OTHERS[others]])
    z = signs @ signs.T / np.sqrt(signs.shape[1])
    pairs = z[np.triu_indices(len(z), 1)]
    assert np.abs(pairs).max() < stats.norm.isf(1e-3 / len(pairs) / 2)
    assert stats.kstest(pairs, "norm").pvalue > 1e-3
    shifted = [signs[i, WIDTH:] @ signs[i + 1, :-WIDTH] / np.sqrt(signs.shape[1] - WIDTH) for i in range(len(z) - 1)]
    assert np.abs(shifted).max() < 4


@pytest.mark.parametrize("count", [1, 4, 16])
def test_a_trial_draws_what_it_draws_alone(count):
    sizes = [6 + 3 * (i % 3) for i in range(count)]
    rates = [0.0 if i % 4 == 3 else 0.1 * (1 + i % 5) for i in range(count)]
    keys = [None if i % 5 == 4 else MaskKey(100 + i, (7, 1)) for i in range(count)]
    stack = kept(sizes, keys, rates, 3, torch.empty(sum(sizes), 10))
    for own, size, p, key in zip(stack.split(sizes), sizes, rates, keys, strict=True):
        alone = torch.ones_like(own) if key is None else mask(key, p, size, 10, 3)
        assert torch.equal(own, alone)
        assert bool(own.all()) == (key is None or p == 0.0)
    order = list(range(count))[::-1]
    turned = kept(*([given[i] for i in order] for given in (sizes, keys, rates)), 3, torch.empty(sum(sizes), 10))
    assert torch.equal(torch.cat(turned.split([sizes[i] for i in order])[::-1]), stack)


def test_longer_padding_changes_no_mask():
    key = MaskKey(5, (7,))
    short, long = (mask(key, positions=4 * n, length=n).view(4, n, WIDTH) for n in (6, 9))
    assert torch.equal(long[:, :6], short)
    assert torch.equal(mask(key, positions=6), mask(key, positions=6, length=6))  # a single row's length says nothing


@pytest.mark.parametrize(("shape", "flat"), [((6, 5, 8), False), ((1, 30, 8), True), ((6, 8), False)])
@pytest.mark.parametrize("own", [1, 2])
def test_the_masks_of_several_processes_are_that_of_one(counted, shape, flat, own):
    owner, x = torch.nn.Identity(), torch.ones(shape)
    units, dim = (30, 1) if flat else (6, 0)
    length = 1 if flat or len(shape) < 3 else shape[1]
    whole = dropped(x, 0.5, [(x.numel(), BatchSlice(owner, 6, 4).mixed(7))], length)
    for before in range(0, units, own):
        part = BatchSlice(owner, own, 4, own if flat else None, Share(before, 6, before, 30))
        given = x.narrow(dim, before, own)
        found = dropped(given, 0.5, [(given.numel(), part.mixed(7))], 1 if own == 1 else length)
        assert torch.equal(found, whole.narrow(dim, before, own))
    assert 0 < int((whole == 0).sum()) < whole.numel()


def test_what_is_kept_is_scaled_and_passes_its_gradient(counted):
    x = torch.randn(4, 6, 10, requires_grad=True)
    y = keyed_dropout(x, 0.25, 11, 6)
    keep = mask(11, 0.25, 24, 10, 6).view(x.shape)
    torch.testing.assert_close(y, x * keep / 0.75)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], keep * (1 / 0.75))
    assert not keyed_dropout(x, 1.0, 11, 6).any()
    assert keyed_dropout(x, 0.0, 11, 6) is x


def test_a_block_that_is_computed_again_draws_its_masks_again(counted):
    parts = [Part(0, 8, 1.5, 0.4, 3, 4), Part(8, 16, 2.0, 0.2, 4, 4)]
    drawn = torch.Generator().manual_seed(0)
    factors = [torch.randn(*s, generator=drawn).requires_grad_() for s in 2 * ((3, WIDTH), (5, 3))]
    x = torch.randn(4, 4, WIDTH, generator=drawn, requires_grad=True)

    def block(x, *given):
        return lora_update(x, x.new_zeros(4, 4, 5), parts, given)

    found = [
        torch.autograd.grad(out.square().sum(), [x, *factors])
        for out in (block(x, *factors), checkpoint(block, x, *factors, use_reentrant=False))
    ]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_mask_is_drawn_once_a_pass_and_without_dropout_not_at_all(counted, monkeypatch):
    drawn, real = [], kept
    monkeypatch.setattr("loralab.adapters.runs.kept", lambda *given: drawn.append(given) or real(*given))
    for count, p, key, times in ((2, 0.5, 1, 1), (1, 0.5, 1, 1), (2, 0.0, 1, 0), (2, 0.5, None, 0)):
        parts = [Part(4 * i, 4 * i + 4, 1.0, p, key) for i in range(count)]
        factors = [torch.randn(s, requires_grad=True) for s in count * [(2, 8), (6, 2)]]
        x = torch.randn(4 * count, 8, requires_grad=True)
        lora_update(x, torch.zeros(4 * count, 6), parts, factors).sum().backward()
        assert len(drawn) == times
        drawn.clear()

"""What seeds say of a claim: paired t tests of where a mean lies, Holm's correction, and what stands beside them.

A claim says that a mean over seeds lies in a region: at or under 0 (an order), within a margin of a value (equality).
Two hypotheses are tested, that it is false and that it is true; at most one of them is rejected.

The paired t test decides, whatever the number of seeds; the exact sign-flip permutation test is reported beside it.
The reverse was not chosen because of small n: with n seeds there are 2^n flips, so the smallest two-sided p is
2^(1-n), which is 0.25 for 3 seeds and under 5% from 6 seeds on, later with Holm's correction; and a rule that changes
at some n would itself be a choice after the fact. The t test needs differences that are about normal, which the
permutation test does not: where it could have followed and does not, the verdict says so.
tests/analysis/test_inference.py measures the error rates, those under other noise than normal too.
"""

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

ALPHA = 0.05
POWER = 0.8
FEWEST_FOR_BOOTSTRAP = 5  # of fewer values there are too few resamples for an interval that covers
MOST_SEEDS = 10_000  # beyond which no number of needed seeds is told
RESAMPLES = 9999  # exact up to 13 seeds, of which there are 8192 sign flips

Array = np.ndarray[Any, Any]
Gaps = tuple[float, ...]


def region(gaps: Array, low: float, high: float) -> tuple[Array, Array]:
    """(p of the claim being false, p of it being true) for the claim that the mean of ``gaps`` (..., seeds) lies
    between ``low`` and ``high``, one of which may be infinite.

    A small first value supports the claim, a small second one contradicts it. With one bound the smaller of the two is
    the two-sided p of the paired t test; with two the first is that of two one-sided tests (TOST, Schuirmann 1987), and
    the second that of the two-sided test against the nearer bound.
    """
    from scipy.special import stdtr  # what scipy.stats calls, without the second that it takes to import

    least = np.minimum(_t(gaps, low), _t(-gaps, -high))
    sides = 2 if np.isinf(low) or np.isinf(high) else 1
    freedom = gaps.shape[-1] - 1
    holds, fails = sides * stdtr(freedom, -least), 2 * stdtr(freedom, least)
    return np.asarray(np.minimum(1.0, holds)), np.asarray(np.minimum(1.0, fails))


def along(values: Array, rising: bool) -> tuple[Array, Array]:
    """The same for the claim that the means of ``values`` (..., seeds, places on the axis) rise, or fall.

    It is supported by a trend (``trend``) in its direction, as long as no neighbouring step goes the other way by more
    than chance; and contradicted by a trend in the other direction, or by such a step (Bonferroni over the steps and
    the trend).
    """
    signed = values if rising else -values
    supports, contradicts = region(trend(signed), 0.0, np.inf)
    steps = np.diff(signed, axis=-1)
    if steps.shape[-1] < 2:
        return supports, contradicts
    each = [region(steps[..., place], 0.0, np.inf)[1] for place in range(steps.shape[-1])]
    wrong = np.minimum(1.0, len(each) * np.min(each, axis=0))
    fails = np.asarray(np.minimum(1.0, 2 * np.minimum(contradicts, wrong)))
    return np.where(wrong <= ALPHA, 1.0, supports), fails


def trend(values: Array) -> Array:
    """Change per place of the axis, seed by seed: the slope of the least-squares line over places 0, 1, 2, ..."""
    places = np.arange(values.shape[-1]) - (values.shape[-1] - 1) / 2
    return np.asarray(values @ places / (places @ places))


def flat(values: Array, margin: float) -> tuple[Array, Array]:
    """The same for the claim that no two means of ``values`` (..., seeds, places) are further apart than ``margin``.

    Supported where TOST finds every pair equivalent, which needs no correction (an intersection-union test, Berger
    1982); contradicted where one pair is further apart, Bonferroni over the pairs.
    """
    pairs = list(zip(*np.triu_indices(values.shape[-1], 1), strict=True))
    each = [region(values[..., one] - values[..., other], -margin, margin) for one, other in pairs]
    holds, fails = (np.stack(found) for found in zip(*each, strict=True))
    return holds.max(axis=0), np.minimum(1.0, len(pairs) * fails.min(axis=0))


def holm(p: Array) -> Array:
    """Adjusted p values of the claims (..., claims) of a sweep, Holm (1979): at most 5% of sweeps have a wrong verdict
    where verdicts are given at 0.05. That it holds for the direction too is Shaffer's (1980)."""
    order = np.argsort(p, axis=-1)
    steps = np.take_along_axis(p, order, -1) * (p.shape[-1] - np.arange(p.shape[-1]))
    adjusted: Array = np.empty_like(steps)
    np.put_along_axis(adjusted, order, np.minimum(1.0, np.maximum.accumulate(steps, axis=-1)), -1)
    return adjusted


@lru_cache(maxsize=4096)
def permutation(gaps: Gaps, low: float, high: float) -> float:
    """p of the sign-flip permutation test of the same hypotheses as ``region``: exact up to 13 seeds, of 9999 flips by
    a fixed seed beyond. Of the claim being false or being true, whichever is smaller."""
    above = _flipped(gaps, low, "greater")
    below = _flipped(gaps, high, "less")
    under, over = _flipped(gaps, low, "less"), _flipped(gaps, high, "greater")
    sides = 2 if np.isinf(low) or np.isinf(high) else 1
    outside = min(p for p, bound in ((under, low), (over, high)) if np.isfinite(bound))
    return min(1.0, sides * max(above, below), 2 * outside)


def _flipped(gaps: Gaps, bound: float, alternative: str) -> float:
    """One-sided p; 0 where the bound is infinite, so that it decides nothing."""
    if np.isinf(bound):
        return 0.0
    from scipy.stats import permutation_test  # takes a second to import

    shifted = (np.asarray(gaps) - bound,)
    how: dict[str, Any] = {"permutation_type": "samples", "n_resamples": RESAMPLES, "vectorized": True}
    found = permutation_test(shifted, np.mean, alternative=alternative, rng=np.random.default_rng(0), **how)
    return float(found.pvalue)


@lru_cache(maxsize=4096)
def bootstrap(gaps: Gaps) -> tuple[float, float] | None:
    """The 95% BCa interval of the mean (Efron 1987) by resampling seeds, a fixed seed; None for fewer than five, or
    where all are equal."""
    if len(gaps) < FEWEST_FOR_BOOTSTRAP or len(set(gaps)) < 2:
        return None
    from scipy.stats import bootstrap as resampled

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a degenerate distribution, whose interval is no number
        found = resampled((np.asarray(gaps),), np.mean, method="BCa", rng=np.random.default_rng(0))
    low, high = map(float, found.confidence_interval)
    return (low, high) if np.isfinite([low, high]).all() else None


def seeds_needed(mean: float, deviation: float, low: float, high: float, level: float = ALPHA) -> int | None:
    """How many seeds would tell with 80% power at ``level``, were the mean and the standard deviation over seeds of the
    differences what they were here; None where more than 10,000, as with a mean on the bound itself.

    Power of the t tests of ``region`` by the noncentral t distribution.
    """

    def enough(n: int) -> bool:
        return _power(n, mean, deviation, low, high, level) >= POWER

    if deviation == 0:
        return 2
    least, most = 1, 2
    while not enough(most):
        if most >= MOST_SEEDS:
            return None
        least, most = most, min(2 * most, MOST_SEEDS)
    return _bisected(enough, least, most)


def _bisected(enough: Callable[[int], bool], least: int, most: int) -> int:
    """The smallest number that is ``enough``, between ``least``, which is not, and ``most``, which is."""
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if enough(middle) else (middle, most)
    return most


def _power(n: int, mean: float, deviation: float, low: float, high: float, level: float) -> float:
    from scipy.special import nctdtr, stdtrit

    inside = low <= mean <= high
    equivalence = inside and np.isfinite(low) and np.isfinite(high)
    limit = stdtrit(n - 1, 1 - (level if equivalence else level / 2))
    bounds = [bound for bound in (low, high) if np.isfinite(bound)]
    distances = [abs(mean - bound) for bound in bounds]
    distances = distances if inside else [min(distances)]
    missed = [nctdtr(n - 1, distance * np.sqrt(n) / deviation, limit) for distance in distances]
    return 1 - float(np.nan_to_num(missed, nan=0.0).sum())  # of a distance so great that it overflows nothing is missed


def _t(gaps: Array, bound: float) -> Array:
    """t of the mean above ``bound``; without any spread the mean itself tells, and on the bound it is not under it."""
    if np.isinf(bound):
        return np.full(gaps.shape[:-1], np.inf)
    distance, error = gaps.mean(axis=-1) - bound, gaps.std(axis=-1, ddof=1) / np.sqrt(gaps.shape[-1])
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(error > 0, distance / error, np.where(distance >= 0, np.inf, -np.inf)))

"""Verdicts on simulated sweeps whose truth is known: how often they are wrong, how often they tell, what they need."""

import numpy as np
import pytest
from scipy import stats

from loralab.analysis.inference import (
    ALPHA,
    along,
    bootstrap,
    flat,
    holm,
    permutation,
    region,
    seeds_needed,
    trend,
)

SWEEPS = 4000
MOST = 0.05 + 3 * (0.05 * 0.95 / SWEEPS) ** 0.5  # that many of SWEEPS may be wrong where 5% are: three standard errors


def simulated(*shape, seed=0):
    """Standard normal noise (SWEEPS, ..., seeds)."""
    return np.random.default_rng(seed).standard_normal((SWEEPS, *shape))


def order(gaps):
    return region(gaps, -np.inf, 0.0)


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_of_an_order_p_is_that_of_scipys_paired_t_test(n):
    one, other = np.random.default_rng(n).standard_normal((2, 6, n))
    holds, fails = order(one - other)
    theirs = stats.ttest_rel(one, other, axis=-1)
    assert np.minimum(holds, fails) == pytest.approx(theirs.pvalue, rel=1e-12)
    assert ((holds < fails) == (theirs.statistic < 0)).all()


def test_of_equality_p_is_the_larger_of_scipys_two_one_sided_tests():
    gaps = np.random.default_rng(0).standard_normal((6, 7))
    above = stats.ttest_1samp(gaps, -0.5, axis=-1, alternative="greater").pvalue
    below = stats.ttest_1samp(gaps, 0.5, axis=-1, alternative="less").pvalue
    assert region(gaps, -0.5, 0.5)[0] == pytest.approx(np.maximum(above, below), rel=1e-12)


def test_without_any_spread_the_difference_itself_tells():
    for mean, holds in ((-1.0, True), (0.0, True), (1.0, False)):
        assert (order(np.full(3, mean))[0] <= ALPHA) == holds
        assert (order(np.full(3, mean))[1] <= ALPHA) == (not holds)


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_an_order_is_told_wrongly_in_5_of_100_sweeps_at_most(n):
    p = np.minimum(*order(simulated(n)))
    assert 0.04 < (p <= ALPHA).mean() < MOST  # of no difference at all, either verdict


@pytest.mark.parametrize("noise", ["laplace", "lognormal", "t3"])
def test_other_noise_than_normal_keeps_the_error_rate(noise):
    draw = np.random.default_rng(1)
    shape = (2, SWEEPS, 5)
    drawn = {
        "laplace": draw.laplace(size=shape),
        "lognormal": draw.lognormal(size=shape),
        "t3": draw.standard_t(3, size=shape),
    }[noise]
    assert (np.minimum(*order(drawn[0] - drawn[1])) <= ALPHA).mean() < MOST


@pytest.mark.parametrize("shared", [0.0, 0.7])
def test_holm_keeps_all_claims_of_a_sweep_right_in_95_of_100(shared):
    # seven claims, which share an arm's noise: five of no difference, two of differences that are found
    noise = simulated(7, 5) * (1 - shared) ** 0.5 + simulated(1, 5, seed=1) * shared**0.5
    effects = np.array([0.0, 0.0, 0.0, 0.0, 0.0, -3.0, 3.0])
    holds, fails = order(noise + effects[:, None])
    told = holm(np.minimum(holds, fails)) <= ALPHA
    assert told[:, :5].any(axis=-1).mean() < MOST
    assert (np.minimum(holds, fails) <= ALPHA)[:, :5].any(axis=-1).mean() > 1.5 * MOST  # the reason to correct
    assert told[:, 5:].mean() > 0.5
    wrong = told & np.where(effects < 0, holds > fails, holds < fails)
    assert wrong[:, 5:].any(axis=-1).mean() < 0.01


def test_holms_p_are_those_of_his_own_example():
    # Holm (1979) steps down: the smallest of m times m, the next times m - 1, never less than the one before
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.9, 0.8])) == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("n", [3, 5, 10])
def test_equality_is_told_of_unequal_arms_in_5_of_100_sweeps_at_most(n):
    holds, _ = region(0.5 * simulated(n) + 1.0, -1.0, 1.0)  # a difference that is just the margin
    assert (holds <= ALPHA).mean() < MOST
    _, fails = region(0.5 * simulated(n) + 1.0, -1.0, 1.0)
    assert (fails <= ALPHA).mean() < MOST
    assert (region(0.2 * simulated(n), -1.0, 1.0)[0] <= ALPHA).mean() > 0.9


def test_power_rises_with_seeds_and_with_the_effect():
    told = {
        (n, effect): (order(simulated(n) - effect)[0] <= ALPHA).mean() for n in (3, 5, 10) for effect in (0.5, 1.0, 2.0)
    }
    for n in (3, 5, 10):
        assert told[n, 0.5] < told[n, 1.0] < told[n, 2.0]
    for effect in (0.5, 1.0, 2.0):
        assert told[3, effect] < told[5, effect] < told[10, effect]
    assert told[10, 2.0] > 0.99


@pytest.mark.parametrize(("mean", "low", "high"), [(-0.8, -np.inf, 0.0), (0.1, -0.9, 0.9), (1.6, -1.0, 1.0)])
def test_the_seeds_that_are_needed_tell_in_80_of_100_sweeps(mean, low, high):
    n = seeds_needed(mean, 1.0, low, high)
    inside = low <= mean <= high
    told = [(region(simulated(k) + mean, low, high)[0 if inside else 1] <= ALPHA).mean() for k in (n - 1, n)]
    assert told[0] < 0.83
    assert 0.78 < told[1] < 0.87


def test_the_seeds_that_are_needed_are_those_of_the_tables():
    # Cohen (1988), table 2.4.1 for paired differences: d = 0.5 needs 34, d = 0.8 needs 15, at 5% and 80% power
    assert [seeds_needed(d, 1.0, -np.inf, 0.0) for d in (0.5, 0.8)] == [34, 15]
    assert seeds_needed(0.0, 1.0, -np.inf, 0.0) is None
    assert seeds_needed(0.5, 1.0, -np.inf, 0.0, level=0.01) > 34


@pytest.mark.parametrize("n", [3, 6, 9])
@pytest.mark.parametrize(("low", "high"), [(-np.inf, 0.0), (-0.4, 0.9)])
def test_the_permutation_test_goes_through_every_flip(n, low, high):
    gaps = tuple(np.random.default_rng(n).standard_normal(n) + 0.3)
    signs = np.array(np.meshgrid(*[[-1, 1]] * n)).reshape(n, -1)

    def share(bound, sign):
        shifted = np.array(gaps) - bound
        return (sign * signs.T @ shifted >= sign * shifted.sum() - 1e-9).mean() if np.isfinite(bound) else 0.0

    outside = min(share(bound, sign) for bound, sign in ((low, -1), (high, 1)) if np.isfinite(bound))
    sides = 1 if np.isfinite(low) else 2
    expected = min(1.0, sides * max(share(low, 1), share(high, -1)), 2 * outside)
    assert permutation(gaps, low, high) == pytest.approx(expected)
    assert permutation(gaps, -np.inf, 0.0) >= 2.0 ** (1 - n)


def test_bootstrap_intervals_cover_and_are_the_same_at_every_call():
    draw = np.random.default_rng(0)
    held = [low <= 0.3 <= high for low, high in (bootstrap(tuple(draw.normal(0.3, 1, 12))) for _ in range(150))]
    assert 0.85 < np.mean(held) <= 0.99  # a little under 95% with 12 seeds, as is known of it
    values = (0.1, 0.4, 0.2, 0.7, 0.3)
    first = bootstrap(values)
    bootstrap.cache_clear()
    assert bootstrap(values) == first
    assert bootstrap(values[:4]) is None
    assert bootstrap((1.0,) * 5) is None


@pytest.mark.parametrize("n", [2, 3, 5])
def test_a_region_ends_where_the_interval_does(n):
    level = 0.95
    gaps = simulated(n) + 0.7
    reach = stats.t.ppf((1 + level) / 2, n - 1) * gaps.std(axis=-1, ddof=1) / n**0.5
    assert abs((np.abs(gaps.mean(axis=-1) - 0.7) <= reach).mean() - level) < 3 * (0.95 * 0.05 / SWEEPS) ** 0.5
    told = np.minimum(*order(gaps)) <= 1 - level
    assert (told == (np.abs(gaps.mean(axis=-1)) >= reach)).all()


def test_a_trend_is_the_slope_of_the_least_squares_line():
    values = np.random.default_rng(0).standard_normal((3, 5))
    assert trend(values) == pytest.approx(np.polyfit(np.arange(5), values.T, 1)[0])


@pytest.mark.parametrize("n", [3, 6])
def test_a_rise_is_told_wrongly_in_5_of_100_sweeps_at_most(n):
    level = simulated(n, 4)
    assert (along(level, rising=True)[0] <= ALPHA).mean() < MOST / 2
    assert (along(level, rising=True)[1] <= ALPHA).mean() < MOST  # it neither falls nor has a step down
    rises = 0.5 * level + np.arange(4)
    assert (along(rises, rising=True)[0] <= ALPHA).mean() > 0.7
    assert (along(rises, rising=True)[1] <= ALPHA).mean() < 0.01
    assert (along(rises, rising=False)[1] <= ALPHA).mean() > 0.6


def test_a_step_the_other_way_takes_the_rise_away():
    values = 0.1 * simulated(6, 4) + np.array([0.0, 2.0, 1.0, 3.0])
    holds, fails = along(values, rising=True)
    assert (holds > ALPHA).all()
    assert (fails <= ALPHA).mean() > 0.99


@pytest.mark.parametrize("places", [2, 4])
def test_flatness_is_told_of_what_is_not_in_5_of_100_sweeps_at_most(places):
    apart = np.zeros(places)
    apart[0] = 1.0  # just the margin away from the others
    holds, fails = flat(0.3 * simulated(5, places) + apart, 1.0)
    assert (holds <= ALPHA).mean() < MOST
    assert (fails <= ALPHA).mean() < MOST
    assert (flat(0.1 * simulated(5, places), 1.0)[0] <= ALPHA).mean() > 0.9
    assert (flat(0.1 * simulated(5, places) + 2 * apart, 1.0)[1] <= ALPHA).mean() > 0.9


def wrongly_better(common):
    """How often an arm whose learning rate was chosen is told to be better than one that had a single rate, though all
    rates are equal. ``common``: share of the noise of a trial's validation score that its test score has too: the luck
    of its weights, while the rest is that of the rows."""
    validation, rows, single = simulated(8, 5), simulated(8, 5, seed=3), simulated(5, seed=9)
    best = validation.mean(axis=-1).argmin(axis=-1)
    test = common**0.5 * validation + (1 - common) ** 0.5 * rows
    holds, _ = order(test[np.arange(SWEEPS), best] - single)
    return (holds <= ALPHA).mean()


def test_a_chosen_rate_is_scored_on_data_that_did_not_choose_it():
    assert wrongly_better(common=0.0) < MOST / 2  # one direction
    # What chose a rate praises it: the reason for a split of its own. Where the two splits agree on a trial's luck,
    # some of the praise stays, and only other seeds would be without it.
    assert wrongly_better(common=1.0) > 1.5 * MOST
    assert wrongly_better(common=0.0) < wrongly_better(common=0.5) < wrongly_better(common=1.0)

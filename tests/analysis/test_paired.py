"""Paired differences: by seed, with an interval that covers as often as it says."""

import math
import random

import pytest

from loralab.analysis.paired import paired, t_quantile


@pytest.mark.parametrize(
    ("freedom", "value"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227)]
)
def test_quantiles_are_those_of_the_tables(freedom, value):
    assert t_quantile(freedom) == pytest.approx(value, rel=1e-5)


def test_many_degrees_of_freedom_are_nearly_normal():
    assert t_quantile(10_000) == pytest.approx(1.95996, abs=5e-4)


def test_a_quantile_has_its_probability_in_the_closed_forms_of_one_and_two_degrees():
    for level in (0.5, 0.9, 0.99):
        assert t_quantile(1, level) == pytest.approx(math.tan(math.pi * level / 2))
        assert t_quantile(2, level) == pytest.approx(level * math.sqrt(2 / (1 - level**2)))


def test_what_all_arms_share_by_seed_cancels():
    baseline = {"0": 1.0, "1": 50.0, "2": -7.0}
    one = paired({seed: value + 0.25 for seed, value in baseline.items()}, baseline)
    assert one.mean == pytest.approx(0.25)
    assert one.reach == pytest.approx(0.0, abs=1e-12)


def test_only_shared_seeds_count():
    assert paired({"0": 1.0}, {"1": 2.0}) is None
    one = paired({"0": 1.0, "5": 9.0}, {"0": 3.0, "1": 4.0})
    assert (one.seeds, one.mean, one.reach) == (["0"], -2.0, None)


@pytest.mark.parametrize("seeds", [2, 3, 6])
def test_the_interval_holds_the_true_difference_in_95_of_100_studies(seeds):
    noise, held, studies = random.Random(seeds), 0, 4000
    for _ in range(studies):
        baseline = {str(seed): noise.gauss(0, 3) for seed in range(seeds)}
        one = paired({seed: value + noise.gauss(0.7, 1) for seed, value in baseline.items()}, baseline)
        held += abs(one.mean - 0.7) <= one.reach
    assert abs(held / studies - 0.95) < 0.014  # four standard errors


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_an_interval_that_ends_at_0_has_p_of_5_percent(seeds):
    gaps = [0.1 * index for index in range(seeds)]
    spread = paired(dict(zip("abcdefghij", gaps, strict=False)), dict.fromkeys("abcdefghij"[:seeds], 0.0))
    at_zero = [gap - spread.mean + spread.reach for gap in gaps]
    one = paired(dict(zip("abcdefghij", at_zero, strict=False)), dict.fromkeys("abcdefghij"[:seeds], 0.0))
    assert one.reach == pytest.approx(t_quantile(seeds - 1) * spread.reach / t_quantile(seeds - 1))
    assert one.p == pytest.approx(0.05, abs=1e-9)

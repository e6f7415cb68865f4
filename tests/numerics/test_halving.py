"""Which values end at a rung: the worse half, but for the best one's neighbours and what the noise hides."""

import math
from itertools import count

import pytest

from loralab.errors import ConfigError
from loralab.numerics.halving import Halving

GRID = [(f"{0.001 * 2**power:g}",) for power in range(8)]


def rung(*means, gap=0.0, seeds=3):
    """The scores of a value of GRID for each mean, the same noise in every value but ``gap`` more in odd ones."""
    return {
        setting: {str(seed): mean + 0.1 * seed + gap * (seed - 1) * (place % 2) for seed in range(seeds)}
        for place, setting, mean in zip(count(), GRID, means, strict=False)
    }


def test_the_worse_half_ends_but_for_the_neighbours_of_the_best():
    scores = rung(9.0, 8.0, 7.0, 6.0, 5.0, 6.5, 7.5, 8.5)
    assert set(Halving().ended(scores, GRID, "min")) == {GRID[0], GRID[1], GRID[6], GRID[7]}
    assert set(Halving(keep=0.125).ended(scores, GRID, "min")) == set(GRID) - {GRID[3], GRID[4], GRID[5]}
    assert set(Halving(keep=0.125, neighbours=0).ended(scores, GRID, "min")) == set(GRID) - {GRID[4]}
    flipped = {setting: {seed: -value for seed, value in own.items()} for setting, own in scores.items()}
    assert set(Halving().ended(flipped, GRID, "max")) == set(Halving().ended(scores, GRID, "min"))


def test_what_the_noise_over_seeds_hides_stays():
    quiet, loud = (rung(5.0, 5.1, 5.2, 5.3, 5.4, 5.5, 5.6, 5.7, gap=gap) for gap in (0.0, 2.0))
    assert set(Halving().ended(quiet, GRID, "min")) == set(GRID[4:])
    assert set(Halving().ended(loud, GRID, "min")) == {GRID[4], GRID[6]}
    one_seed = rung(5.0, 5.1, 5.2, 5.3, 5.4, 5.5, 5.6, 5.7, seeds=1)
    assert set(Halving().ended(one_seed, GRID, "min")) == set(GRID[4:])


def test_only_what_was_asked_for_ends_and_what_is_not_known_never():
    scores = rung(9.0, 8.0, 7.0, 6.0, 5.0, 6.5, 7.5, 8.5)
    assert set(Halving().ended(scores, GRID[:1], "min")) == {GRID[0]}
    assert set(Halving().ended({**scores, GRID[0]: {"0": math.nan}}, GRID, "min")) == {GRID[1], GRID[6], GRID[7]}
    failed = {**scores, GRID[4]: {"0": 5.0, "1": None}}
    assert Halving().ended(failed, GRID, "min")[GRID[4]] == "a seed of it has failed"
    assert GRID[3] not in Halving().ended(failed, GRID, "min")  # the best of the others
    assert Halving().ended({GRID[0]: {"0": math.nan}}, GRID[:1], "min") == {}
    assert "5" in Halving().ended(scores, GRID, "min")[GRID[0]]


@pytest.mark.parametrize("rungs", [[], [0.5, 0.25], [0.5, 0.5], [0.0], [1.0], [-0.1]])
def test_rungs_that_are_no_rising_shares_are_refused(rungs):
    with pytest.raises(ConfigError, match=r"sweep\.halving"):
        Halving(rungs=rungs)

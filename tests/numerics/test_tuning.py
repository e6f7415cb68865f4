"""Which value of what is tuned an arm gets, and where its grid goes on."""

import math

import pytest

from loralab.numerics.tuning import choose, following

GRID = [("0.001",), ("0.002",), ("0.004",)]


def scores(**by_value):
    """{setting: {seed: score}} of ``v0_001=(1.0, 2.0)``: a score a seed."""
    return {
        (name[1:].replace("_", "."),): {str(seed): value for seed, value in enumerate(values)}
        for name, values in by_value.items()
    }


def test_the_best_mean_over_seeds_is_chosen_not_the_best_single_score():
    found = choose(scores(v0_001=(2.0, 2.0), v0_002=(1.0, 3.4), v0_004=(2.5, 2.4)), "min")
    assert (found.setting, found.complete, found.edges) == (("0.001",), True, ((0, -1),))
    assert found.means == {("0.001",): 2.0, ("0.002",): 2.2, ("0.004",): 2.45}
    assert choose(scores(v0_001=(0.2, 0.4), v0_002=(0.1, 0.6)), "max").setting == ("0.002",)


def test_of_equal_means_the_least_value_is_chosen_in_whatever_order_they_were_tried():
    tied = scores(v0_004=(1.0, 2.0), v0_002=(2.0, 1.0), v0_001=(3.0, 3.0))
    for order in (tied, dict(reversed(tied.items()))):
        assert choose(order, "min").setting == ("0.002",)
    texts = {("linear",): {"0": 1.0}, ("cosine",): {"0": 1.0}, ("10",): {"0": 1.0}, ("9",): {"0": 1.0}}
    assert choose(texts, "max").setting == ("9",)


@pytest.mark.parametrize("lost", [None, math.nan, math.inf])
def test_a_value_with_a_lost_seed_is_not_chosen_and_bounds_the_grid(lost):
    found = choose(scores(v0_001=(3.0, 3.0), v0_002=(2.0, 2.0), v0_004=(1.0, lost)), "min")
    assert (found.setting, found.complete, found.edges) == (("0.002",), True, ())
    assert set(found.means) == {("0.001",), ("0.002",)}


def test_where_every_value_lacks_a_seed_those_with_the_most_compare_over_what_they_share():
    lacking = scores(v0_001=(3.0, 1.0, None), v0_002=(2.0, 2.5, None), v0_004=(0.0, None, None))
    found = choose(lacking, "min")
    assert (found.setting, found.complete, found.seeds) == (("0.001",), False, ("0", "1"))
    assert found.means == {("0.001",): 2.0, ("0.002",): 2.25}
    nothing = choose(scores(v0_001=(None,), v0_002=(None,)), "min")
    assert (nothing.setting, nothing.means, nothing.seeds) == (None, {}, ())
    assert following(nothing, [], GRID, 2) == []


def asked(value, tried, grid=GRID, extend=2):
    """What follows where ``value`` of ``tried`` is the best."""
    found = choose({one: {"0": float(one != value)} for one in tried}, "min")
    return following(found, tried, grid, extend)


def test_beyond_an_edge_the_grid_goes_on_by_its_own_step_as_far_as_it_may():
    assert asked(("0.002",), GRID) == []
    assert asked(("0.004",), GRID) == [("0.008",)]
    assert asked(("0.008",), [*GRID, ("0.008",)]) == [("0.016",)]
    assert asked(("0.016",), [*GRID, ("0.008",), ("0.016",)]) == []
    assert asked(("0.008",), [*GRID, ("0.008",)], extend=1) == []
    assert asked(("0.001",), GRID) == [("0.0005",)]
    assert asked(("0.001",), GRID, extend=0) == []
    assert asked(("0.0",), [("0.0",), ("0.1",)], grid=[("0.0",), ("0.1",)]) == []  # nothing is below 0
    assert asked(("0.1",), [("0.0",), ("0.1",)], grid=[("0.0",), ("0.1",)]) == [("0.2",)]
    assert asked(("-2",), [("-2",), ("-1",)], grid=[("-2",), ("-1",)]) == [("-3",)]
    assert asked(("0.0005",), [*GRID, ("0.0005",), ("0.008",)]) == [("0.00025",)]


def test_a_grid_with_zero_goes_on_by_differences_and_one_of_names_not_at_all():
    ends = [("0",), ("0.05",), ("0.1",)]
    assert asked(("0.1",), ends, grid=ends) == [("0.15",)]
    names = [("linear",), ("cosine",)]
    assert asked(("cosine",), names, grid=names) == []


def test_each_of_two_tuned_settings_has_edges_of_its_own():
    grid = [(lr, decay) for lr in ("0.001", "0.002") for decay in ("0.1", "0.2")]
    found = choose({one: {"0": float(one != ("0.002", "0.1"))} for one in grid}, "min")
    assert found.edges == ((0, 1), (1, -1))
    assert following(found, grid, grid, 1) == [("0.004", "0.1"), ("0.002", "0.05")]

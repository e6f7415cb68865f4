"""Thinned curves keep their ends and extremes; smoothing and means are those of their definitions."""

import statistics

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralab.analysis.curves import MOST_POINTS, Curves, metrics, smoothed, thin, together


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=700), st.integers(4, MOST_POINTS))
def test_thinning_keeps_ends_extremes_and_order(values, limit):
    rows = [(float(step), value) for step, value in enumerate(values)]
    kept = thin(rows, limit)
    assert len(kept) <= limit
    assert kept == sorted(kept)
    assert set(kept) <= set(rows)
    assert (kept[0], kept[-1]) == (rows[0], rows[-1])
    assert {min(values), max(values)} <= {value for _, value in kept}


def test_a_spike_survives_in_a_long_curve():
    rows = [(float(step), 1.0) for step in range(100_000)]
    rows[77_777] = (77_777.0, 50.0)
    assert (77_777.0, 50.0) in thin(rows)


def test_smoothing_is_pandas_exponential_mean():
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0]
    made = [value for _, value in smoothed(list(enumerate(values)), 0.8)]
    assert made == pytest.approx(list(pd.Series(values).ewm(alpha=0.2, adjust=True).mean()))


def test_lines_together_are_their_mean_and_range_at_each_step():
    rows = together([[(1, 2.0), (2, 4.0)], [(1, 3.0), (3, 5.0)]])
    assert rows == [(1, 2.5, 2.0, 3.0), (2, 4.0, 4.0, 4.0), (3, 5.0, 5.0, 5.0)]
    assert rows[0][1] == statistics.fmean([2.0, 3.0])


def test_a_series_is_of_finite_numbers_and_metrics_are_those_that_repeat():
    rows = [{"step": 1, "train/loss": 1.0, "val/loss": 2.0}, {"step": 2, "train/loss": float("nan"), "train/x": "a"}]
    assert Curves.of(rows).series("train/loss") == [(1.0, 1.0)]
    curves = Curves.of([*rows, {"step": 3, "val/loss": 1.0, "val/x": 1}])
    assert metrics([curves, Curves.of(rows)], ("train/loss", "val/loss")) == [
        "train/loss",
        "val/loss",
    ]

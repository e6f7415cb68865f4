"""Rows average seeds, and only seeds; failures stay in sight; the text fits a terminal."""

import statistics

import pytest

from loralab.analysis.arms import arms, comparisons
from loralab.analysis.results import read_results
from loralab.records import record
from loralab.reporting.listing import listing
from loralab.reporting.report import report
from loralab.reporting.table import as_plain, columns, seeds_text
from loralab.reporting.text import terminal


def test_mean_and_sample_deviation_are_over_the_completed_seeds(tmp_path, synthetic, write):
    for seed, loss in enumerate([1.0, 2.0, 4.0]):
        write(tmp_path / str(seed), {**synthetic("none", 2, seed), "metrics": {"val/loss": loss}})
    failed = {**synthetic("none", 2, 3), "status": "failed", "metrics": {"val/loss": 100.0}, "error": "x"}
    write(tmp_path / "3", failed)
    (row,) = arms(read_results(tmp_path))
    assert row.mean == pytest.approx(7 / 3)
    assert row.std == pytest.approx((7 / 3) ** 0.5)
    assert seeds_text(row) == "3 ok, 1 failed"


def test_the_first_value_of_every_axis_is_the_baseline_and_differences_are_paired_by_seed(tmp_path, synthetic, write):
    losses = {(2, 0): 1.0, (2, 1): 5.0, (2, 2): 9.0, (8, 0): 0.9, (8, 1): 4.8, (16, 2): 9.5}
    for (r, seed), loss in losses.items():
        write(tmp_path / f"{r}-{seed}", {**synthetic("none", r, seed), "metrics": {"val/loss": loss}})
    results = read_results(tmp_path)
    first, second, third = (as_plain(row) for row in arms(results))
    assert (first["baseline"], first["difference"]) == (True, None)
    spread = 12.7062047 * statistics.stdev([-0.1, -0.2]) / 2**0.5
    assert second["difference"]["mean"] == pytest.approx(-0.15)
    assert second["difference"]["low"] == pytest.approx(-0.15 - spread)
    assert second["difference"]["high"] == pytest.approx(-0.15 + spread)
    assert second["difference"]["seeds"] == ["0", "1"]
    nothing = {"low": None, "high": None, "p": None}
    assert third["difference"] == {"mean": pytest.approx(0.5), "n": 1, "seeds": ["2"], **nothing}
    assert "-0.1500 [-0.7853, +0.4853]" in terminal(results, comparisons(results))


def test_the_best_of_single_seeds_is_not_marked(tmp_path, synthetic, write):
    for r in (2, 8):
        write(tmp_path / str(r), synthetic("none", r, 0))
    results = read_results(tmp_path)
    text = terminal(results, comparisons(results))
    assert not any(row.best for row in arms(results))
    assert "*" not in text
    assert "standard deviation" not in text
    assert "without an interval" in text
    assert "No intervals: with one seed a row, no difference can be told from chance" in " ".join(text.split())


def test_a_trial_listed_or_found_twice_counts_once(tmp_path, synthetic, write):
    stored_trial = synthetic("none", 2, 0)
    write(tmp_path / "a", stored_trial)
    write(tmp_path / "b", stored_trial)
    found = read_results(tmp_path)
    record.write_sweep(tmp_path, {"name": "t", "axes": {}, "trials": [{"trial": "a", "folder": "a"}] * 2})
    for results in (found, read_results(tmp_path)):
        (row,) = arms(results)
        assert (len(row.scores), row.std, seeds_text(row), results.repeats) == (1, None, "1 ok", 1)


def test_labels_too_long_for_the_terminal_are_spelled_out_below_numbered_rows(tmp_path, synthetic, write):
    for index, prompt in enumerate(["{question} " * 9, "{context} " * 9]):
        stored_trial = synthetic("none", 2, 0)
        stored_trial["config"]["data"]["prompt"] = prompt
        write(tmp_path / str(index), stored_trial)
    results = read_results(tmp_path)
    text = terminal(results, comparisons(results), 60)
    assert "..." not in text
    assert " ".join(text.split()).count("{question}") == 9
    assert "\nrow  val/loss" in text


def test_a_long_error_is_wrapped_not_cut(tmp_path, synthetic, write):
    failed = {**synthetic("none", 2, 0), "status": "failed", "metrics": {}, "error": "word " * 60 + "end"}
    write(tmp_path / "a", failed)
    results = read_results(tmp_path)
    text = terminal(results, comparisons(results))
    assert text.split().count("word") == 60
    assert text.split()[-1] == "end"
    assert max(map(len, text.splitlines())) <= 100


def test_a_trial_without_a_record_is_missing_and_joins_its_configuration(tmp_path, synthetic, write):
    write(tmp_path / "a", synthetic("none", 2, 0))
    listed = [
        {"trial": "a", "folder": "a", "status": "completed"},
        {"trial": "b", "folder": "b", "status": "running", "overrides": ["adapter.r=2", "seed=1"]},
    ]
    record.write_sweep(tmp_path, {"name": "t", "axes": {"adapter.r": [2], "seed": [0, 1]}, "trials": listed})
    results = read_results(tmp_path)
    (row,) = arms(results)
    assert seeds_text(row) == "1 ok, 1 missing"
    assert "missing: r=2 seed=1" in terminal(results, comparisons(results))


@pytest.mark.parametrize(
    ("metrics", "counted", "status", "why"),
    [
        ({"val/loss": float("nan")}, "1 failed", "diverged", "val/loss is not finite"),
        ({"val/loss": None}, "1 failed", "diverged", "val/loss is not finite"),
        ({}, "1 without a result", "without_result", "completed, but val/loss is no finite number"),
    ],
)
def test_a_completed_trial_whose_metric_is_no_number_is_no_result(
    tmp_path, synthetic, write, metrics, counted, status, why
):
    write(tmp_path / "a", {**synthetic("none", 2, 0), "metrics": metrics})
    write(tmp_path / "b", synthetic("none", 2, 1))
    done = report(tmp_path)
    (row,) = arms(read_results(tmp_path))
    assert (row.n, seeds_text(row)) == (1, f"1 ok, {counted}")
    assert f"{status}: seed=0: {why}" in " ".join(done.table.split())
    page, markdown = done.index.read_text(), done.files["report.md"].read_text()
    assert "1 of 2" in page
    assert "1 failed, listed below" in page
    assert why in page.partition("Not completed")[2]
    assert why in markdown.partition("Not completed")[2]
    assert [entry["failed"] for entry in listing(tmp_path) if entry["name"] == "a"] == [1]


def test_the_terminal_table_fits_and_names_every_failure(synthetic_sweep):
    results = read_results(synthetic_sweep)
    text = terminal(results, comparisons(results))
    assert max(map(len, text.splitlines())) <= 100
    assert "out_of_memory: quantization=int8_absmax r=8 seed=1: backward: no room" in text
    for wanted in ("val/loss", "vs baseline", "bits/param", "1 ok, 1 failed"):
        assert wanted in text


@pytest.mark.parametrize("width", [30, 50, 72, 100, 200])
def test_a_table_with_long_labels_still_fits(tmp_path, synthetic, write, width):
    for index, modules in enumerate((["a_very_long_name"] * 9, ["x"])):
        stored_trial = synthetic("none", 2, 0)
        stored_trial["config"]["adapter"]["target_modules"] = modules
        write(tmp_path / str(index), stored_trial)
    results = read_results(tmp_path)
    text = terminal(results, comparisons(results), width)
    assert max(map(len, text.splitlines())) <= width


def test_columns_that_nothing_can_fill_are_left_out(tmp_path, synthetic, write):
    stored_trial = synthetic("none", 2, 0)
    stored_trial["memory"].update(predicted_peak_bytes=None, measured_peak_bytes=None)
    write(tmp_path / "a", stored_trial)
    results = read_results(tmp_path)
    titles = [column.title for column in columns(comparisons(results)[0])]
    assert titles == ["bits/param", "base size", "trainable", "train s", "tokens/s"]

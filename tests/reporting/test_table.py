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


def test_trials_that_differ_only_by_seed_share_a_row(synthetic_sweep):
    found = arms(read_results(synthetic_sweep))
    assert len(found) == 6
    assert [len(row.trials) for row in found] == [2] * 6


def test_rows_follow_the_order_of_the_axes(synthetic_sweep):
    found = arms(read_results(synthetic_sweep))
    keys = [tuple(row.values.values()) for row in found]
    assert keys == [(q, r) for q in ("none", "int8_absmax", "nf4_double") for r in ("2", "8")]


def test_mean_and_sample_deviation_are_over_the_completed_seeds(tmp_path, make_trial):
    synthetic, write = make_trial
    for seed, loss in enumerate([1.0, 2.0, 4.0]):
        write(tmp_path / str(seed), {**synthetic("none", 2, seed), "metrics": {"val/loss": loss}})
    failed = {**synthetic("none", 2, 3), "status": "failed", "metrics": {"val/loss": 100.0}, "error": "x"}
    write(tmp_path / "3", failed)
    (row,) = arms(read_results(tmp_path))
    assert row.mean == pytest.approx(7 / 3)
    assert row.std == pytest.approx((7 / 3) ** 0.5)
    assert seeds_text(row) == "3 ok, 1 failed"


def test_one_seed_has_no_deviation(tmp_path, make_trial):
    synthetic, write = make_trial
    write(tmp_path / "a", synthetic("none", 2, 0))
    (row,) = arms(read_results(tmp_path))
    assert row.std is None
    assert not row.best


@pytest.mark.parametrize("key", ["lora_alpha", "a_key_of_a_later_version"])
def test_different_configurations_are_never_averaged_even_if_no_axis_says_so(tmp_path, make_trial, key):
    synthetic, write = make_trial
    for seed, value in enumerate([8, 32]):
        made = synthetic("none", 2, seed)
        made["config"]["adapter"][key] = value
        write(tmp_path / str(seed), made)
    results = read_results(tmp_path)
    assert len(arms(results)) == 2
    assert results.axes[f"adapter.{key}"] == ["8", "32"]


def test_the_first_value_of_every_axis_is_the_baseline_and_differences_are_paired_by_seed(tmp_path, make_trial):
    synthetic, write = make_trial
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


def test_the_declared_order_of_an_axis_decides_the_baseline(synthetic_sweep):
    (baseline,) = (row for row in arms(read_results(synthetic_sweep)) if row.baseline)
    assert baseline.values == {"quantization": "none", "adapter.r": "2"}


def test_the_best_of_single_seeds_is_not_marked(tmp_path, make_trial):
    synthetic, write = make_trial
    for r in (2, 8):
        write(tmp_path / str(r), synthetic("none", r, 0))
    results = read_results(tmp_path)
    text = terminal(results, comparisons(results))
    assert not any(row.best for row in arms(results))
    assert "*" not in text
    assert "standard deviation" not in text
    assert "without an interval" in text
    assert "No intervals: with one seed a row, no difference can be told from chance" in " ".join(text.split())


def test_a_trial_listed_or_found_twice_counts_once(tmp_path, make_trial):
    synthetic, write = make_trial
    made = synthetic("none", 2, 0)
    write(tmp_path / "a", made)
    write(tmp_path / "b", made)
    found = read_results(tmp_path)
    record.write_sweep(tmp_path, {"name": "t", "axes": {}, "trials": [{"trial": "a", "folder": "a"}] * 2})
    for results in (found, read_results(tmp_path)):
        (row,) = arms(results)
        assert (len(row.scores), row.std, seeds_text(row), results.repeats) == (1, None, "1 ok", 1)


def test_the_name_of_the_sweep_is_no_axis_and_one_trial_has_none(tmp_path, make_trial):
    synthetic, write = make_trial
    for r, name in ((2, "rank"), (8, "alpha")):
        made = synthetic("none", r, 0)
        made["choices"].update(sweeps=name, logger=name)
        write(tmp_path / name, made)
    assert list(read_results(tmp_path).axes) == ["adapter.r"]
    axes = {"sweeps": ["rank"], "logger": ["none"], "adapter.r": ["2"]}
    record.write_sweep(tmp_path, {"name": "t", "axes": axes, "trials": [{"trial": "a", "folder": "rank"}]})
    assert read_results(tmp_path).axes == {}


def test_labels_too_long_for_the_terminal_are_spelled_out_below_numbered_rows(tmp_path, make_trial):
    synthetic, write = make_trial
    for index, prompt in enumerate(["{question} " * 9, "{context} " * 9]):
        made = synthetic("none", 2, 0)
        made["config"]["data"]["prompt"] = prompt
        write(tmp_path / str(index), made)
    results = read_results(tmp_path)
    text = terminal(results, comparisons(results), 60)
    assert "..." not in text
    assert " ".join(text.split()).count("{question}") == 9
    assert "\nrow  val/loss" in text


def test_a_long_error_is_wrapped_not_cut(tmp_path, make_trial):
    synthetic, write = make_trial
    failed = {**synthetic("none", 2, 0), "status": "failed", "metrics": {}, "error": "word " * 60 + "end"}
    write(tmp_path / "a", failed)
    results = read_results(tmp_path)
    text = terminal(results, comparisons(results))
    assert text.split().count("word") == 60
    assert text.split()[-1] == "end"
    assert max(map(len, text.splitlines())) <= 100


def test_logger_settings_do_not_make_a_configuration(synthetic_sweep):
    assert not any("logger" in axis for axis in read_results(synthetic_sweep).axes)


def test_the_best_row_follows_the_metric_and_its_direction(tmp_path, make_trial):
    synthetic, write = make_trial
    for r, seed, value in ((2, 0, 0.7), (2, 1, 0.71), (8, 0, 0.9), (8, 1, 0.91)):
        made = synthetic("none", r, seed)
        made["config"].update(metric="val/accuracy", metric_mode="max")
        write(tmp_path / f"{r}-{seed}", {**made, "metrics": {"val/accuracy": value, "val/loss": value}})
    results = read_results(tmp_path)
    best = [row.values["adapter.r"] for row in arms(results) if row.best]
    assert results.metric == "val/accuracy"
    assert best == ["8"]


def test_axes_come_from_the_configurations_where_there_is_no_sweep_file(tmp_path, make_trial):
    synthetic, write = make_trial
    for scheme in ("none", "nf4_double"):
        for r in (2, 8):
            write(tmp_path / f"{scheme}{r}", synthetic(scheme, r, 0))
    assert read_results(tmp_path).axes == {"quantization": ["nf4_double", "none"], "adapter.r": ["2", "8"]}


def test_a_list_axis_is_matched_however_it_is_spelled(tmp_path, make_trial):
    synthetic, write = make_trial
    made = synthetic("none", 2, 0)
    made["config"]["adapter"]["target_modules"] = ["q_proj", "v_proj"]
    write(tmp_path / "a", made)
    axes = {"adapter.target_modules": ["[q_proj, v_proj]", "all-linear"]}
    record.write_sweep(tmp_path, {"name": "t", "axes": axes, "trials": [{"trial": "a", "folder": "a"}]})
    assert read_results(tmp_path).axes["adapter.target_modules"] == ["q_proj,v_proj", "all-linear"]


def test_a_trial_without_a_record_is_missing_and_joins_its_configuration(tmp_path, make_trial):
    synthetic, write = make_trial
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
def test_a_completed_trial_whose_metric_is_no_number_is_no_result(tmp_path, make_trial, metrics, counted, status, why):
    synthetic, write = make_trial
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
def test_a_table_with_long_labels_still_fits(tmp_path, make_trial, width):
    synthetic, write = make_trial
    for index, modules in enumerate((["a_very_long_name"] * 9, ["x"])):
        made = synthetic("none", 2, 0)
        made["config"]["adapter"]["target_modules"] = modules
        write(tmp_path / str(index), made)
    results = read_results(tmp_path)
    text = terminal(results, comparisons(results), width)
    assert max(map(len, text.splitlines())) <= width


def test_columns_that_nothing_can_fill_are_left_out(tmp_path, make_trial):
    synthetic, write = make_trial
    made = synthetic("none", 2, 0)
    made["memory"].update(predicted_peak_bytes=None, measured_peak_bytes=None)
    write(tmp_path / "a", made)
    results = read_results(tmp_path)
    titles = [column.title for column in columns(comparisons(results)[0])]
    assert titles == ["bits/param", "base size", "trainable", "train s", "tokens/s"]

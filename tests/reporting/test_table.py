"""Rows average seeds, and only seeds; failures stay in sight; the text fits a terminal."""

import pytest

from loralab import record
from loralab.reporting.gather import study
from loralab.reporting.table import columns, rows, seeds_text, terminal


def test_trials_that_differ_only_by_seed_share_a_row(synthetic_sweep):
    found = rows(study(synthetic_sweep))
    assert len(found) == 6
    assert [len(row.trials) for row in found] == [2] * 6


def test_rows_follow_the_order_of_the_axes(synthetic_sweep):
    found = rows(study(synthetic_sweep))
    keys = [tuple(row.values.values()) for row in found]
    assert keys == [(q, r) for q in ("none", "int8_absmax", "nf4_double") for r in ("2", "8")]


def test_mean_and_sample_deviation_are_over_the_completed_seeds(tmp_path, make_trial):
    synthetic, write = make_trial
    for seed, loss in enumerate([1.0, 2.0, 4.0]):
        write(tmp_path / str(seed), {**synthetic("none", 2, seed), "metrics": {"val/loss": loss}})
    failed = {**synthetic("none", 2, 3), "status": "failed", "metrics": {"val/loss": 100.0}, "error": "x"}
    write(tmp_path / "3", failed)
    (row,) = rows(study(tmp_path))
    assert row.mean == pytest.approx(7 / 3)
    assert row.std == pytest.approx((7 / 3) ** 0.5)
    assert seeds_text(row) == "3 ok, 1 failed"


def test_one_seed_has_no_deviation(tmp_path, make_trial):
    synthetic, write = make_trial
    write(tmp_path / "a", synthetic("none", 2, 0))
    (row,) = rows(study(tmp_path))
    assert row.std is None
    assert not row.best


@pytest.mark.parametrize("key", ["lora_alpha", "a_key_of_a_later_version"])
def test_different_configurations_are_never_averaged_even_if_no_axis_says_so(tmp_path, make_trial, key):
    synthetic, write = make_trial
    for seed, value in enumerate([8, 32]):
        made = synthetic("none", 2, seed)
        made["config"]["adapter"][key] = value
        write(tmp_path / str(seed), made)
    gathered = study(tmp_path)
    assert len(rows(gathered)) == 2
    assert gathered.axes[f"adapter.{key}"] == ["8", "32"]


def test_logger_settings_do_not_make_a_configuration(synthetic_sweep):
    assert not any("logger" in axis for axis in study(synthetic_sweep).axes)


def test_the_best_row_follows_the_metric_and_its_direction(tmp_path, make_trial):
    synthetic, write = make_trial
    for r, value in ((2, 0.7), (8, 0.9)):
        made = synthetic("none", r, 0)
        made["config"].update(metric="val/accuracy", metric_mode="max")
        write(tmp_path / str(r), {**made, "metrics": {"val/accuracy": value, "val/loss": value}})
    gathered = study(tmp_path)
    best = [row.values["adapter.r"] for row in rows(gathered) if row.best]
    assert gathered.metric == "val/accuracy"
    assert best == ["8"]


def test_axes_come_from_the_configurations_where_there_is_no_sweep_file(tmp_path, make_trial):
    synthetic, write = make_trial
    for scheme in ("none", "nf4_double"):
        for r in (2, 8):
            write(tmp_path / f"{scheme}{r}", synthetic(scheme, r, 0))
    assert study(tmp_path).axes == {"quantization": ["nf4_double", "none"], "adapter.r": ["2", "8"]}


def test_a_list_axis_is_matched_however_it_is_spelled(tmp_path, make_trial):
    synthetic, write = make_trial
    made = synthetic("none", 2, 0)
    made["config"]["adapter"]["target_modules"] = ["q_proj", "v_proj"]
    write(tmp_path / "a", made)
    axes = {"adapter.target_modules": ["[q_proj, v_proj]", "all-linear"]}
    record.write_sweep(tmp_path, {"name": "t", "axes": axes, "trials": [{"trial": "a", "folder": "a"}]})
    assert study(tmp_path).axes["adapter.target_modules"] == ["q_proj,v_proj", "all-linear"]


def test_a_trial_without_a_record_is_missing_and_joins_its_configuration(tmp_path, make_trial):
    synthetic, write = make_trial
    write(tmp_path / "a", synthetic("none", 2, 0))
    listed = [
        {"trial": "a", "folder": "a", "status": "completed"},
        {"trial": "b", "folder": "b", "status": "running", "overrides": ["adapter.r=2", "seed=1"]},
    ]
    record.write_sweep(tmp_path, {"name": "t", "axes": {"adapter.r": [2], "seed": [0, 1]}, "trials": listed})
    gathered = study(tmp_path)
    (row,) = rows(gathered)
    assert seeds_text(row) == "1 ok, 1 missing"
    assert "missing: r=2 seed=1" in terminal(gathered, [row])


def test_a_completed_trial_without_the_metric_is_counted_as_such(tmp_path, make_trial):
    synthetic, write = make_trial
    write(tmp_path / "a", {**synthetic("none", 2, 0), "metrics": {"val/loss": float("nan")}})
    (row,) = rows(study(tmp_path))
    assert row.mean is None
    assert "without the metric" in seeds_text(row)


def test_the_terminal_table_fits_and_names_every_failure(synthetic_sweep):
    gathered = study(synthetic_sweep)
    text = terminal(gathered, rows(gathered))
    assert max(map(len, text.splitlines())) <= 100
    assert "out_of_memory: quantization=int8_absmax r=8 seed=1: backward: no room" in text
    for wanted in ("val/loss", "bits/param", "trainable", "train s", "4.127", "1 ok, 1 failed"):
        assert wanted in text


@pytest.mark.parametrize("width", [30, 50, 72, 100, 200])
def test_a_table_with_long_labels_still_fits(tmp_path, make_trial, width):
    synthetic, write = make_trial
    for index, modules in enumerate((["a_very_long_name"] * 9, ["x"])):
        made = synthetic("none", 2, 0)
        made["config"]["adapter"]["target_modules"] = modules
        write(tmp_path / str(index), made)
    gathered = study(tmp_path)
    text = terminal(gathered, rows(gathered), width)
    assert max(map(len, text.splitlines())) <= width


def test_columns_that_nothing_can_fill_are_left_out(tmp_path, make_trial):
    synthetic, write = make_trial
    made = synthetic("none", 2, 0)
    made["memory"].update(predicted_peak_bytes=None, measured_peak_bytes=None)
    write(tmp_path / "a", made)
    gathered = study(tmp_path)
    titles = [column.title for column in columns(gathered, rows(gathered))]
    assert titles == ["bits/param", "trainable", "train s", "tokens/s"]


def test_a_packs_memory_and_time_are_marked(tmp_path, make_trial):
    synthetic, write = make_trial
    made = synthetic("none", 2, 0)
    made["pack"]["size"] = 4
    write(tmp_path / "a", made)
    gathered = study(tmp_path)
    text = terminal(gathered, rows(gathered))
    assert "(p) trained in a pack" in text
    assert "MiB (p)" in text

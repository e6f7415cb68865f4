"""Arms average seeds, and only seeds; axes come from what varies."""

import pytest

from loralab.analysis.arms import arms
from loralab.analysis.results import read_results
from loralab.records import record


def test_trials_that_differ_only_by_seed_share_a_row(synthetic_sweep):
    found = arms(read_results(synthetic_sweep))
    assert len(found) == 6
    assert [len(row.trials) for row in found] == [2] * 6


def test_rows_follow_the_order_of_the_axes(synthetic_sweep):
    found = arms(read_results(synthetic_sweep))
    keys = [tuple(row.values.values()) for row in found]
    assert keys == [(q, r) for q in ("none", "int8_absmax", "nf4_double") for r in ("2", "8")]


def test_one_seed_has_no_deviation(tmp_path, synthetic, write):
    write(tmp_path / "a", synthetic("none", 2, 0))
    (row,) = arms(read_results(tmp_path))
    assert row.std is None
    assert not row.best


@pytest.mark.parametrize("key", ["lora_alpha", "a_key_of_a_later_version"])
def test_different_configurations_are_never_averaged_even_if_no_axis_says_so(tmp_path, synthetic, write, key):
    for seed, value in enumerate([8, 32]):
        stored_trial = synthetic("none", 2, seed)
        stored_trial["config"]["adapter"][key] = value
        write(tmp_path / str(seed), stored_trial)
    results = read_results(tmp_path)
    assert len(arms(results)) == 2
    assert results.axes[f"adapter.{key}"] == ["8", "32"]


def test_the_declared_order_of_an_axis_decides_the_baseline(synthetic_sweep):
    (baseline,) = (row for row in arms(read_results(synthetic_sweep)) if row.baseline)
    assert baseline.values == {"quantization": "none", "adapter.r": "2"}


def test_the_name_of_the_sweep_is_no_axis_and_one_trial_has_none(tmp_path, synthetic, write):
    for r, name in ((2, "rank"), (8, "alpha")):
        stored_trial = synthetic("none", r, 0)
        stored_trial["choices"].update(sweeps=name, logger=name)
        write(tmp_path / name, stored_trial)
    assert list(read_results(tmp_path).axes) == ["adapter.r"]
    axes = {"sweeps": ["rank"], "logger": ["none"], "adapter.r": ["2"]}
    record.write_sweep(tmp_path, {"name": "t", "axes": axes, "trials": [{"trial": "a", "folder": "rank"}]})
    assert read_results(tmp_path).axes == {}


def test_logger_settings_do_not_make_a_configuration(synthetic_sweep):
    assert not any("logger" in axis for axis in read_results(synthetic_sweep).axes)


def test_the_best_row_follows_the_metric_and_its_direction(tmp_path, synthetic, write):
    for r, seed, value in ((2, 0, 0.7), (2, 1, 0.71), (8, 0, 0.9), (8, 1, 0.91)):
        stored_trial = synthetic("none", r, seed)
        stored_trial["config"].update(metric="val/accuracy", metric_mode="max")
        write(tmp_path / f"{r}-{seed}", {**stored_trial, "metrics": {"val/accuracy": value, "val/loss": value}})
    results = read_results(tmp_path)
    best = [row.values["adapter.r"] for row in arms(results) if row.best]
    assert results.metric == "val/accuracy"
    assert best == ["8"]


def test_axes_come_from_the_configurations_where_there_is_no_sweep_file(tmp_path, synthetic, write):
    for scheme in ("none", "nf4_double"):
        for r in (2, 8):
            write(tmp_path / f"{scheme}{r}", synthetic(scheme, r, 0))
    assert read_results(tmp_path).axes == {"quantization": ["nf4_double", "none"], "adapter.r": ["2", "8"]}


def test_a_list_axis_is_matched_however_it_is_spelled(tmp_path, synthetic, write):
    stored_trial = synthetic("none", 2, 0)
    stored_trial["config"]["adapter"]["target_modules"] = ["q_proj", "v_proj"]
    write(tmp_path / "a", stored_trial)
    axes = {"adapter.target_modules": ["[q_proj, v_proj]", "all-linear"]}
    record.write_sweep(tmp_path, {"name": "t", "axes": axes, "trials": [{"trial": "a", "folder": "a"}]})
    assert read_results(tmp_path).axes["adapter.target_modules"] == ["q_proj,v_proj", "all-linear"]

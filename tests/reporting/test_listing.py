"""``loralab ls``: every sweep and every lone run once, damaged ones too."""

import json
import shutil

import pytest

from loralab.analysis.trials import read_trial
from loralab.errors import ArtifactError
from loralab.records import record
from loralab.reporting.listing import listing, render


def test_sweeps_and_lone_runs_are_listed_and_trials_of_a_sweep_are_not(synthetic_sweep, tmp_path):
    shutil.copytree(synthetic_sweep, tmp_path / "synthetic")
    shutil.copytree(synthetic_sweep / "none,r=2,seed=0", tmp_path / "train" / "lone")
    entries = {entry["name"]: entry for entry in listing(tmp_path)}
    assert set(entries) == {"synthetic", "lone"}
    sweep = entries["synthetic"]
    assert (sweep["kind"], sweep["trials"], sweep["completed"], sweep["failed"]) == ("sweep", 12, 11, 1)
    assert entries["lone"]["kind"] == "run"


def test_the_records_say_how_far_a_sweep_is_not_its_list(tmp_path):
    trials = [{"trial": name, "folder": name, "status": "running"} for name in ("a", "b")]
    record.write_sweep(tmp_path / "s", {"name": "s", "trials": trials})
    record.write(tmp_path / "s" / "a", {**record.blank("a"), "status": "completed"})
    (entry,) = listing(tmp_path)
    assert (entry["completed"], entry["running"], entry["missing"]) == (1, 0, 1)
    assert "1 completed, 1 missing" in render([entry])


def test_a_damaged_sweep_is_listed_as_damaged(tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "sweep.json").write_text("{")
    (entry,) = listing(tmp_path)
    assert "sweep.json" in entry["error"]
    assert "damaged" in render([entry])


def test_an_empty_folder_and_a_missing_one(tmp_path):
    assert listing(tmp_path) == []
    assert "no sweep" in render([])
    with pytest.raises(ArtifactError, match="no such folder"):
        listing(tmp_path / "nothing")


def test_the_text_fits_the_terminal(tmp_path):
    record.write(tmp_path / ("long" * 40), {**record.blank("a"), "status": "failed", "error": "x"})
    assert max(map(len, render(listing(tmp_path)).splitlines())) <= 100


def test_runs_are_told_apart_by_value_model_data_and_settings(tmp_path, synthetic, write):
    for r in (2, 8):
        write(tmp_path / "train" / f"2026-01-0{r}", {**synthetic("none", r, 0), "metrics": {"val/loss": r + 0.5}})
    lines = render(listing(tmp_path), 200).splitlines()[1:]
    for r, line in zip((2, 8), lines, strict=True):
        for wanted in (f"val/loss {r}.5000", "tiny", "docstrings", f"adapter.r={r}", "completed"):
            assert wanted in line, wanted


def test_a_sweeps_own_folder_lists_its_trials(synthetic_sweep):
    entries = listing(synthetic_sweep)
    assert {entry["kind"] for entry in entries} == {"trial"}
    assert len(entries) == 12
    text = " ".join(render(entries).split())
    assert "quantization=int8_absmax r=8 seed=1" in text
    assert "out of memory" in text


@pytest.mark.parametrize("damage", [{"trials": [{"folder": 5}]}, {"name": [1]}, {"question": [1]}, {"paper": "x"}])
def test_what_one_folder_holds_does_not_hide_the_others(synthetic_sweep, tmp_path, damage):
    shutil.copytree(synthetic_sweep, tmp_path / "good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "sweep.json").write_text(json.dumps(damage))
    entries = {entry["name"]: entry for entry in listing(tmp_path)}
    assert entries["synthetic"]["completed"] == 11
    assert "sweep.json" in entries["bad"]["error"]


def test_a_damaged_trial_is_counted_in_its_sweep(synthetic_sweep, tmp_path):
    shutil.copytree(synthetic_sweep, tmp_path / "s")
    (tmp_path / "s" / "none,r=2,seed=0" / "result.json").write_text("")
    (entry,) = listing(tmp_path)
    assert (entry["completed"], entry["failed"], entry["statuses"]["damaged"]) == (10, 2, 1)


def test_an_imported_adapter_without_a_metric_is_no_failure(tmp_path, synthetic, write):
    stored = synthetic("none", 2, 0)
    write(tmp_path / "a", {**stored, "metrics": {}, "adapter": {**stored["adapter"], "note": "imported from x (PEFT)"}})
    write(tmp_path / "b", {**stored, "metrics": {}})
    statuses = {name: read_trial(tmp_path / name).status for name in "ab"}
    assert statuses == {"a": "imported", "b": "without_result"}
    assert "trained elsewhere; loralab import with val/loss=VALUE" in read_trial(tmp_path / "a").reason

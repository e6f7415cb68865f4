"""The frame of a sweep: a row a trial, every setting and every number under its dotted name."""

import os
import shutil
import socket

import pytest

from loralab.analysis.results import read_results
from loralab.records import record


def test_the_frame_has_a_row_a_trial_with_settings_and_metrics_under_dotted_names(synthetic_sweep):
    frame = read_results(synthetic_sweep).frame
    assert list(frame.columns[:5]) == ["trial", "folder", "status", "seed", "error"]
    assert len(frame) == 12
    assert frame["status"].value_counts().to_dict() == {"completed": 11, "out_of_memory": 1}
    failed = frame["status"] != "completed"
    assert list(frame["error"][failed]) == [
        record.read(synthetic_sweep / name)["error"] for name in frame["folder"][failed]
    ]
    assert frame["error"][~failed].isna().all()
    assert frame["error"][failed].notna().all()
    first = frame.iloc[0]
    stored = record.read(synthetic_sweep / first["folder"])
    wanted = {
        "trial": stored["trial"],
        "adapter.r": 2,
        "quantization": "none",
        "val/loss": stored["metrics"]["val/loss"],
        "time.steps": 60,
        "environment.versions.torch": "2.13.0",
    }
    assert {key: first[key] for key in wanted} == wanted


def test_means_over_seeds_are_one_groupby_away(synthetic_sweep):
    results = read_results(synthetic_sweep)
    means = results.frame.groupby(["quantization", "adapter.r"])["val/loss"].mean()
    losses = [trial.score("val/loss") for trial in results.trials if trial.values["quantization"] == "nf4_double"]
    assert means["nf4_double", 2] == pytest.approx(sum(losses[:2]) / 2)


def test_a_trial_without_a_record_has_a_row_without_numbers(synthetic_sweep, tmp_path):
    shutil.copytree(synthetic_sweep, tmp_path / "s")
    shutil.rmtree(tmp_path / "s" / "none,r=2,seed=0")
    frame = read_results(tmp_path / "s").frame
    (missing,) = frame[frame["status"] == "missing"].to_dict("records")
    assert missing["val/loss"] != missing["val/loss"]
    assert len(frame) == 12


def test_a_moved_sweep_is_still_readable(synthetic_sweep, tmp_path):
    shutil.copytree(synthetic_sweep, tmp_path / "moved")
    sweep = record.read_sweep(tmp_path / "moved")
    for trial in sweep["trials"]:
        trial["folder"] = f"/nowhere/any/more/{trial['folder']}"
    record.write_sweep(tmp_path / "moved", sweep)
    assert read_results(tmp_path / "moved").count("completed") == 11


def test_a_running_record_whose_process_is_gone_is_interrupted(tmp_path, synthetic, write):
    gone = {"status": "running", "host": socket.gethostname(), "pid": 2**22 + 1}
    write(tmp_path / "gone", {**synthetic("none", 2, 0), **gone})
    write(tmp_path / "here", {**synthetic("none", 2, 1), **gone, "pid": os.getpid()})
    write(tmp_path / "huge", {**synthetic("none", 2, 3), **gone, "pid": 10**30})
    write(tmp_path / "away", {**synthetic("none", 2, 2), **gone, "host": "another-machine"})
    statuses = {trial.name: trial.status for trial in read_results(tmp_path).trials}
    assert statuses == {"gone": "interrupted", "huge": "interrupted", "here": "running", "away": "running"}

"""metrics.jsonl holds every finished row, whatever happens to the process."""

import json
import os
import signal
import subprocess
import sys

import pytest

from loralab.errors import DiskError
from loralab.records.jsonl import MetricsFile, rows


def test_rows_come_back_and_numbers_that_are_not_finite_are_null(tmp_path):
    file = MetricsFile(tmp_path / "deep" / "metrics.jsonl")
    file.log(1, {"train/loss": 2.5})
    file.log(2, {"train/loss": float("nan"), "x": float("inf")})
    written = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert written == [{"step": 1, "train/loss": 2.5}, {"step": 2, "train/loss": None, "x": None}]


def test_a_killed_process_loses_no_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    code = (
        "import sys, os, signal; from pathlib import Path; from loralab.records.jsonl import MetricsFile\n"
        "f = MetricsFile(Path(sys.argv[1]))\n"
        "[f.log(i, {'a': 0.5}) for i in range(50)]\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)])
    assert done.returncode == -signal.SIGKILL
    assert len(path.read_text().splitlines()) == 50


def test_a_torn_line_and_rows_behind_the_step_are_dropped_when_a_run_goes_on(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        file.log(step, {"train/loss": 0.5 * step})
    file.log(2, {"val/loss": 9.0})
    file.finish(0)
    with file.path.open("a") as torn:
        torn.write('{"step": 2, "train/lo')
    again = MetricsFile(file.path, step=2)
    again.log(3, {"train/loss": 7.0})
    again.finish(0)
    assert [(step, values["train/loss"]) for step, values in rows(file.path)] == [(1, 0.5), (2, 1.0), (3, 7.0)]
    assert len(file.path.read_text().splitlines()) == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_a_disk_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(DiskError, match="cannot be written"):
        MetricsFile(tmp_path / "no" / "metrics.jsonl")


def test_a_file_in_the_way_is_a_disk_error(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(DiskError, match="cannot be written"):
        MetricsFile(tmp_path / "run" / "metrics.jsonl")

"""metrics.jsonl holds every finished row, whatever happens to the process."""

import json
import os
import signal
import subprocess
import sys

import pytest

from loralab.errors import DiskError
from loralab.records.jsonl import MetricsFile


def test_rows_come_back_and_numbers_that_are_not_finite_are_null(tmp_path):
    file = MetricsFile(tmp_path / "deep" / "metrics.jsonl")
    file.log(1, {"train/loss": 2.5})
    file.log(2, {"train/loss": float("nan"), "x": float("inf")})
    rows = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert rows == [{"step": 1, "train/loss": 2.5}, {"step": 2, "train/loss": None, "x": None}]


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


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_a_disk_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(DiskError, match="cannot be written"):
        MetricsFile(tmp_path / "no" / "metrics.jsonl")


def test_a_file_in_the_way_is_a_disk_error(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(DiskError, match="cannot be written"):
        MetricsFile(tmp_path / "run" / "metrics.jsonl")

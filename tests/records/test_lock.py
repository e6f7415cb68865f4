"""A folder belongs to one process at a time."""

import subprocess
import sys

import pytest

from loralab.errors import ArtifactError, DiskError
from loralab.records.lock import hold

OTHER = (
    "import sys, pathlib; from loralab.records.lock import hold\nwith hold(pathlib.Path(sys.argv[1])): print('mine')"
)


def other(folder):
    return subprocess.run([sys.executable, "-c", OTHER, str(folder)], capture_output=True, text=True, check=False)


def test_a_second_process_is_refused_and_told_who_holds_it(tmp_path):
    import os

    with hold(tmp_path):
        refused = other(tmp_path)
        assert "ArtifactError" in refused.stderr
        assert f"in use by process {os.getpid()} on " in refused.stderr
    assert other(tmp_path).stdout == "mine\n"


def test_one_process_cannot_hold_a_folder_twice(tmp_path):
    with hold(tmp_path), pytest.raises(ArtifactError, match="in use by process"), hold(tmp_path):
        pass


def test_a_killed_holder_leaves_no_lock(tmp_path):
    code = OTHER.replace("print('mine')", "import os; os.kill(os.getpid(), 9)")
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    with hold(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_a_disk_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match="cannot be written"), hold(tmp_path / "file" / "run"):
        pass

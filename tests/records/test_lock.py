"""A folder belongs to one process at a time."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loralab.errors import ArtifactError, DiskError
from loralab.records.lock import hold

OTHER = (
    "import sys, pathlib; from loralab.records.lock import hold\nwith hold(pathlib.Path(sys.argv[1])): print('mine')"
)


def other(folder):
    return subprocess.run([sys.executable, "-c", OTHER, str(folder)], capture_output=True, text=True, check=False)


def test_a_second_process_is_refused_and_told_who_holds_it(tmp_path):
    with hold(tmp_path):
        for _ in range(2):  # the first refusal takes nothing away
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


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_takes_no_file_is_a_disk_error(tmp_path, monkeypatch, error):
    def refuse(path, *given, **more):
        raise OSError(error, os.strerror(error), str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    message = f"the run folder {tmp_path} cannot be written: {os.strerror(error)}"
    with pytest.raises(DiskError, match=message), hold(tmp_path):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="the file system of Windows has locks")
@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_holds_nothing(tmp_path, monkeypatch, recwarn, error):
    def refuse(*given):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("fcntl.flock", refuse)
    with hold(tmp_path), hold(tmp_path):
        pass
    assert not recwarn


def test_an_error_inside_passes_and_frees_the_folder(tmp_path):
    with pytest.raises(OSError, match="of the run"), hold(tmp_path):
        raise OSError("of the run")
    with hold(tmp_path):
        pass

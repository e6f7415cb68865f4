"""Every failure becomes one of loralab's, with the exit code that says what to do about it."""

import errno
import os

import pytest

from loralab.errors import ConfigError, Interrupted, LoralabError, explain, unwritable


def of_the_system(number, *path):
    return OSError(number, os.strerror(number), *path)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("wrong"), 2, "wrong"),
        (Interrupted(15), 143, "signal 15"),
        (KeyboardInterrupt(), 130, "signal 2"),
        (MemoryError("of the host"), 6, "data.batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 6, "out of memory"),
        (of_the_system(errno.ENOSPC, "file"), 7, "the disk is full"),
        (of_the_system(errno.EDQUOT), 7, "the disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 7, "what was finished before is kept"),
        (of_the_system(errno.EACCES, "file"), 7, "file cannot be read or written: Permission denied"),
        (of_the_system(errno.ENOTDIR, "a/b"), 7, "a/b cannot be read or written"),
        (of_the_system(errno.ENOENT), 2, "the current folder is gone"),
        (of_the_system(errno.ECONNRESET), 1, "ConnectionResetError"),
        (ZeroDivisionError("division\n by zero"), 1, "ZeroDivisionError: division by zero"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_error_has_its_exit_code_and_its_words(error, code, said):
    known = explain(error)
    assert known.exit_code == code
    assert said in str(known)


def test_what_is_not_known_keeps_its_cause():
    error = ZeroDivisionError()
    assert explain(error).__cause__ is error


@pytest.mark.parametrize("later", [OSError(errno.ENOSPC, "full"), LoralabError("later"), ValueError("later")])
def test_what_goes_wrong_while_an_interruption_is_dealt_with_is_that_interruption(later):
    later.__context__ = ValueError("between")
    later.__context__.__context__ = Interrupted(15)
    assert explain(later).exit_code == 143


def test_a_file_that_cannot_be_written_is_named_with_the_reason(tmp_path):
    assert (
        str(unwritable(tmp_path, of_the_system(errno.EROFS))) == f"{tmp_path} cannot be written: Read-only file system"
    )


def test_an_error_of_the_users_own_code_names_its_line(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def fails():\n    return [][1]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    import mine

    with pytest.raises(IndexError) as own:
        mine.fails()
    with pytest.raises(TypeError) as loralabs:
        explain.__globals__["nearest"]("name", 5)
    assert str(explain(own.value)) == "mine.py:2: IndexError: list index out of range"
    assert str(explain(loralabs.value)).startswith("TypeError: ")

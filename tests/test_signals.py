"""A process ends with the one that has started it, and no signal is lost while it starts."""

import os
import signal
import time

import pytest
from forked import Forked

from loralab import signals
from loralab.errors import Interrupted


def until(path, seconds=20.0):
    end = time.monotonic() + seconds
    while not path.is_file():
        assert time.monotonic() < end
        time.sleep(0.02)
    return path.read_text()


def interrupted(act):
    """The exit code of what stops ``act``."""
    try:
        act()
    except Interrupted as stopped:
        return stopped.exit_code
    return 0


@pytest.mark.skipif(os.name != "posix", reason="a process does not learn there that its parent is gone")
def test_a_process_ends_with_the_one_that_was_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "WATCHED", 0.05)

    def started():
        signals.listen()
        signals.end_with(os.getppid())
        (tmp_path / "begun").touch()
        code = interrupted(lambda: time.sleep(60))
        (tmp_path / "ended").write_text(str(code))
        return code

    def starts():
        Forked(started).wait()
        return 0

    parent = Forked(starts)
    until(tmp_path / "begun")
    parent.kill()
    assert parent.wait() == -signal.SIGKILL
    time.sleep(0.1)
    assert until(tmp_path / "ended") == "143"


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals cannot be held back there")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_comes_before_a_process_listens_waits_until_it_does(number, code):
    def begins():
        time.sleep(0.2)
        return interrupted(signals.listen)

    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with signals.held_back():
        process = Forked(begins)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    process.send_signal(number)
    assert process.wait() == code


@pytest.mark.skipif(os.name != "posix", reason="there are no signals of this kind there")
@pytest.mark.parametrize(("stopped", "code"), [(False, -signal.SIGINT), (True, 130)])
def test_a_signal_while_the_process_exits_shows_no_traceback(stopped, code):
    """After the first one the exit code is the promised one, whatever else comes."""

    def exits():
        signals.listen()
        found = interrupted(lambda: os.kill(os.getpid(), signal.SIGINT)) if stopped else 0
        signals.unlisten()
        os.kill(os.getpid(), signal.SIGINT)
        return found

    assert Forked(exits).wait() == code


@pytest.mark.skipif(os.name != "posix", reason="there are no signals of this kind there")
def test_a_signal_that_an_import_made_something_else_of_is_not_lost():
    """And one that comes when a library has set the handler again raises nothing."""

    def swallows():
        signals.listen()
        own = signal.getsignal(signal.SIGINT)
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except Interrupted:
            signal.signal(signal.SIGINT, own)
        os.kill(os.getpid(), signal.SIGINT)
        return interrupted(signals.check)

    assert Forked(swallows).wait() == 130

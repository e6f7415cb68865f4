"""SIGINT and SIGTERM as an exception, so that records are written before the process ends."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

from loralab.errors import Interrupted

Handler = Callable[[int, Any], None]

STOPPING = (signal.SIGINT, signal.SIGTERM)
WATCHED = 0.5  # seconds between looks at the parent


class _Steps:
    """Between ``begin`` and ``end`` a training step is under way whose state could not be written."""

    under_way = False
    waiting: Callable[[], None] | None = None  # the first handler that was called in it


_steps: _Steps | None = None  # None outside of a training


@contextmanager
def whole_steps() -> Iterator[None]:
    """Within, a signal that comes between ``begin_step`` and ``end_step`` waits for the latter. What still waits at the
    end, after an error within a step, is answered then."""
    global _steps
    before, _steps = _steps, _Steps()
    try:
        yield
    finally:
        left, _steps = _steps, before
        if left.waiting is not None:
            left.waiting()


def begin_step() -> None:
    """Within ``whole_steps``: from here on the first signal waits for ``end_step``. A second one does not."""
    if _steps is not None:
        _steps.under_way = True


def end_step() -> None:
    """Answers the signal that has waited since ``begin_step``: raises Interrupted where its handler does."""
    if _steps is None:
        return
    _steps.under_way = False
    waiting, _steps.waiting = _steps.waiting, None
    if waiting is not None:
        waiting()


@contextmanager
def whole() -> Iterator[None]:
    """Within, the first signal waits for the end; where a step is under way, for that of the step."""
    if _steps is None or _steps.under_way:
        yield
        return
    begin_step()
    try:
        yield
    finally:
        end_step()


def after_the_step(handler: Handler) -> Handler:
    """``handler`` of a signal, called at the end of a step that is under way."""

    @wraps(handler)
    def wait(number: int, frame: Any) -> None:
        if _steps is not None and _steps.under_way and _steps.waiting is None:
            _steps.waiting = partial(handler, number, frame)
        else:
            handler(number, frame)

    return wait


class _Stop:
    """A handler that raises once, whoever sets it again: Lightning does at the end of a fit."""

    number = 0  # of the signal that came

    def __call__(self, number: int, frame: Any) -> None:
        if self.number:
            return
        self.number = number
        for other in STOPPING:  # records are being written from now on
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(number)


_stop = _Stop()  # of this process


def listen() -> None:
    """From here on SIGINT and SIGTERM raise Interrupted in the main thread, also one that was held back before; later
    ones are ignored."""
    global _stop
    _stop = _Stop()
    for number in STOPPING:
        signal.signal(number, after_the_step(_stop))
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def check() -> None:
    """Raises Interrupted again where one has come: an import that is interrupted may raise something else, which then
    looks like a setting that is not valid."""
    if _stop.number:
        raise Interrupted(_stop.number)


def unlisten() -> None:
    """From here on they end the process at once: it is about to exit, and nothing is left to write. After a first one
    they stay ignored, so that it exits with its code."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN if _stop.number else signal.SIG_DFL)


@contextmanager
def held_back() -> Iterator[None]:
    """A process that is started within gets no SIGINT and no SIGTERM before it listens: until then it could not answer
    them by a record."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with(parent: int) -> None:
    """From here on this process is told to stop (SIGTERM) once ``parent``, whose child it is, was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCHED)
        os.kill(os.getpid(), signal.SIGTERM)

    if os.name == "posix":
        threading.Thread(target=watch, name="parent", daemon=True).start()


@contextmanager
def listening() -> Iterator[None]:
    """Within, the first SIGINT raises Interrupted and later ones are ignored, in the main thread and where Python's own
    handler was set, which is set again afterwards.

    Lightning answers the KeyboardInterrupt of that handler with ``exit(1)``, before a record says what has happened.
    """
    own = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not own or threading.current_thread() is not threading.main_thread():
        yield
        return

    @after_the_step
    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise Interrupted(number)

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)

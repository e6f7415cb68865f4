"""SIGINT and SIGTERM as an exception, so that records are written before the process ends."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loralab.errors import Interrupted


def listen() -> None:
    """From here on SIGINT and SIGTERM raise Interrupted in the main thread; later ones are ignored."""

    def stop(number: int, frame: Any) -> None:
        for other in (signal.SIGINT, signal.SIGTERM):  # records are being written from now on
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


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

    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise Interrupted(number)

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)

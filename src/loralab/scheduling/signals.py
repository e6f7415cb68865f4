"""SIGINT and SIGTERM as an exception, so that records are written before the process ends."""

import signal
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

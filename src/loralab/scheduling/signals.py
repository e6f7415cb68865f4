"""SIGINT and SIGTERM as an exception, so that records are written before the process ends."""

import signal
from typing import Any

from loralab.errors import Interrupted


def listen() -> None:
    """A signal ends what runs by Interrupted, once."""

    def stop(number: int, frame: Any) -> None:
        for other in (signal.SIGINT, signal.SIGTERM):  # once is enough: records are being written now
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)

"""Processes that measure: each in a group of its own, of which nothing runs on once its ``with`` has ended."""

import json
import logging
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

log = logging.getLogger(__name__)

Row = dict[str, Any]
SOURCE = Path(__file__).resolve().parents[2]
KILLED_S = 5.0  # a process that is gone no sooner than this after a kill hangs in the driver, and is left behind
EXIT_S = 30.0  # what a process may take to end once it has closed its answers


class Late(Exception):  # noqa: N818 - as Interrupted: not an error but an end
    """The time limit was reached."""


class ProcessError(RuntimeError):
    """A process failed at what it was asked. ``code``: its exit code; None where it goes on."""

    def __init__(self, name: str, code: int | None, text: str) -> None:
        super().__init__(f"{name}: {text}" if code is None else f"{name} ended with exit code {code}: {text}")
        self.code = code


class WorkerProcess:
    """``worker`` with an engine that is made from ``setup``. It answers each request, one after the other.

    Its stderr is a log in ``folder``, where it works; ``deadline``: on the monotonic clock.
    """

    def __init__(
        self, engine: str, setup: Row, folder: Path, environment: Mapping[str, str], deadline: float = math.inf
    ) -> None:
        self.engine, self.deadline, self._begun = engine, deadline, time.perf_counter()
        self._log = folder / f"process{len(list(folder.glob('process*.log')))}.log"
        path = os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        with self._log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "loralab.bench.worker", engine],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": path, **offline, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                process_group=0,
            )
        self._input: Any = self._process.stdin
        self._answers = queue.SimpleQueue[str]()
        threading.Thread(target=self._read, daemon=True).start()
        self._send(setup)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends it and what it has started."""
        with suppress(OSError):
            self._input.close()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        if self._ended(KILLED_S) is None:
            log.warning("process %d cannot be killed, it hangs in the driver; it is left behind", self._process.pid)

    def wait_until_ready(self) -> None:
        """Waits until its engine is made; ``startup_s`` are the seconds since its start."""
        self.ask({})
        self.startup_s = time.perf_counter() - self._begun

    def ask(self, request: Row) -> Row:
        """The answer, with the ``seconds`` it took. Raises ProcessError, and Late at the deadline."""
        self._send(request)
        seconds_left = self.deadline - time.monotonic()
        try:
            line = self._answers.get(timeout=None if seconds_left == math.inf else max(0.0, seconds_left))
        except queue.Empty:
            raise Late(f"stopped in {self.engine}: {self.tail(300)}") from None
        if not line:
            self._answers.put(line)  # so it is for the next request
            raise ProcessError(self.engine, self._ended(EXIT_S), self.tail())
        answer: Row = json.loads(line)
        if answer.get("error"):
            raise ProcessError(self.engine, None, answer["error"])
        return answer

    def finish(self) -> None:
        """Waits for its end, which closing its input asks for."""
        self._input.close()
        self._process.wait()

    def tail(self, characters: int = 1000) -> str:
        """The end of what it wrote to stderr, or to stdout beside its answers."""
        return self._log.read_text("utf-8", "replace").strip()[-characters:]

    def _ended(self, seconds: float) -> int | None:
        """Its exit code; None where it still runs after that time."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.returncode

    def _send(self, row: Row) -> None:
        with suppress(OSError):  # of a process that has ended: told when its answer is read
            self._input.write(json.dumps(row) + "\n")
            self._input.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            for line in answers:
                self._answers.put(line)
        self._answers.put("")

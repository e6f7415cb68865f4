"""The stages' results so far, on disk as they come, and the processes that make them, each with a deadline."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loralab.records import record
from loralab.reporting import card

log = logging.getLogger(__name__)

SOURCE = Path(__file__).resolve().parents[2]
RECORDS = "records.jsonl"
FEWEST_S = 8.0  # a process with less time than this is not started
POLL_S = 0.2
KILLED_S = 5.0  # a process that is gone no sooner than this after a kill hangs in the driver, and is left behind

Row = dict[str, Any]


class Late(Exception):  # noqa: N818 - as Interrupted: not an error but an end
    """The stage's time is spent."""


class ProcessError(RuntimeError):
    """A process ended with an exit code that is not 0."""

    def __init__(self, module: str, code: int, said: str) -> None:
        super().__init__(f"{module} ended with exit code {code}: {said}")
        self.code = code


class Skipped(Exception):  # noqa: N818
    """What the stage needs is not installed."""


class Session:
    """One ``make gpu``. ``rehearsal``: tiny shapes on the CPU. Below ``out`` there are at most three files:
    gpu.json, index.html, and the runs' records, a line each."""

    def __init__(self, out: Path, rehearsal: bool, work: Path, budgets: Mapping[str, float]) -> None:
        self.out, self.rehearsal, self.work, self.budgets = out, rehearsal, work, budgets
        self.deadline = self.begun = time.monotonic()
        self.found: Row = {
            **{"schema": 2, "rehearsal": rehearsal, "device": "cpu" if rehearsal else "cuda"},
            **{"date": datetime.now(UTC).isoformat("T", "seconds"), "seconds": 0.0, "stages": {}},
        }
        for name in ("gpu.json", "index.html", RECORDS):
            (out / name).unlink(missing_ok=True)

    def save(self) -> None:
        """gpu.json and the page, as they stand."""
        self.found["seconds"] = round(time.monotonic() - self.begun, 1)
        record.replace(self.out / "gpu.json", self.found)
        (self.out / "index.html").write_text(card.page(self.found), "utf-8")

    def stage(self, name: str, work: Callable[["Session", Row], None]) -> None:
        """Runs ``work`` until its time, with all that earlier stages left, is spent. What it found by then is kept,
        and its end is in ``status``: ok, failed, timeout or skipped (and ``error`` says why)."""
        names = list(self.budgets)
        self.deadline = self.begun + sum(self.budgets[one] for one in names[: names.index(name) + 1])
        # failed until it is known to be otherwise: a reader of gpu.json may come at any time
        told: Row = {"status": "failed", "seconds": 0.0, "error": "it had not ended when this was written"}
        started, self.found["stages"][name] = time.monotonic(), told
        log.info("%s, at most %.0f s", name, self.deadline - started)
        try:
            self.save()
            work(self, told)
            told.update(status="ok", error=None)
        except Late as late:
            told.update(status="timeout", error=str(late))
        except Skipped as why:
            told.update(status="skipped", error=str(why))
        except Exception as error:
            told.update(error=f"{type(error).__name__}: {' '.join(str(error).split())[-2000:]}")
        finally:
            told["seconds"] = round(time.monotonic() - started, 1)
            self.save()
        log.info("%s: %s after %.0f s%s", name, told["status"], told["seconds"], f": {told['error'] or ''}")

    def python(self, *words: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> "Process":
        """``python WORDS`` over this source tree. Raises Late where the stage has too little time left to start it."""
        left = self.deadline - time.monotonic()
        if left < FEWEST_S:
            raise Late(f"{max(0.0, left):.0f} s were left for {' '.join(words)[:200]}")
        paths = [str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])]
        around = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TRANSFORMERS_OFFLINE": "1"}
        around.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        # one card, the first that this process may use
        around["CUDA_VISIBLE_DEVICES"] = "" if self.rehearsal else around.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        return Process([*words], cwd or self.work, {**around, **(environment or {})}, self._new("process", "log"))

    def lines(self, module: str, job: Any, environment: Mapping[str, str] | None = None) -> Iterator[Row]:
        """What ``python -m MODULE JOB ANSWERS`` appends to ANSWERS, a JSON object a line, as it comes.

        Raises Late at the deadline and ProcessError where the process fails, in both cases after all its lines.
        """
        asked, answers = self._new("job", "json"), self._new("answers", "jsonl")
        asked.write_text(json.dumps(job), "utf-8")
        answers.touch()
        words = ("-m", module, str(asked), str(answers))
        with self.python(*words, environment=environment) as process, answers.open(encoding="utf-8") as file:
            ended = False
            while not ended:
                ended = process.ended(POLL_S)
                yield from map(json.loads, _whole_lines(file))
                if not ended and time.monotonic() > self.deadline:
                    raise Late(f"stopped in {module}")
            if process.code:
                raise ProcessError(module, process.code, process.said())

    def _new(self, name: str, ending: str) -> Path:
        return self.work / f"{name}{len(list(self.work.glob(f'{name}*.{ending}')))}.{ending}"

    def keep(self, folder: Path, stage: str, name: str) -> tuple[Row, list[Row]] | None:
        """A run's record and metrics, which then are a line of the records' file and no longer a folder; None where
        there is no record."""
        if not (folder / record.RESULT).is_file():
            return None
        found, rows = record.read(folder), read_lines(folder / "metrics.jsonl")
        with (self.out / RECORDS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, "name": name, "record": found, "metrics": rows}) + "\n")
        shutil.rmtree(folder)
        return found, rows


class Process:
    """A process in a group of its own, of which nothing runs when the ``with`` ends; what it says is in ``log``."""

    def __init__(self, words: list[str], cwd: Path, environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        with log.open("wb") as said:
            self._process = subprocess.Popen(
                [sys.executable, *words],
                cwd=cwd,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        if not self.ended(KILLED_S):
            log.warning("process %d cannot be killed, it hangs in the driver; it is left behind", self._process.pid)

    def ended(self, seconds: float) -> bool:
        """Whether it has ended, after ``seconds`` at most."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.returncode

    def said(self, characters: int = 1000) -> str:
        """The end of what it wrote to stdout and stderr."""
        return self._log.read_text("utf-8", "replace").strip()[-characters:]


def _whole_lines(file: Any) -> Iterator[str]:
    while True:
        place = file.tell()
        line = file.readline()
        if not line.endswith("\n"):  # half written: again, later
            file.seek(place)
            return
        yield line


def read_lines(path: Path) -> list[Row]:
    """The objects of a .jsonl file; none where there is none."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []

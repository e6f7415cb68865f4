"""Packs on several GPUs of this machine: a process for each card, which sees that card alone and keeps its own base.

CUDA_VISIBLE_DEVICES is set before the process starts.
"""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.errors import Interrupted
from loralab.records.log_file import LogFile
from loralab.scheduling import tasks
from loralab.scheduling.executors import End, Pack, Task
from loralab.scheduling.job import Job
from loralab.scheduling.packs import spread
from loralab.scheduling.signals import end_with, held_back, listen

STAND_IN = "LORALAB_DEVICES"  # names of devices in place of torch's, for tests


def devices(device: str) -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be set to, one entry a card; empty where there is one or none."""
    names = _split(os.environ.get(STAND_IN, ""))
    if STAND_IN not in os.environ and device == "cuda":
        import torch

        count = torch.cuda.device_count()
        names = _split(os.environ.get("CUDA_VISIBLE_DEVICES", ""))[:count] or [str(index) for index in range(count)]
    return names if len(names) > 1 else []


def _split(names: str) -> list[str]:
    return [name for name in names.split(",") if name]


@dataclass
class _Worker:
    """``asked``: the file with its trials, whose settings may hold secrets: it goes with the process."""

    device: str
    process: Any = None
    asked: Path | None = None


class LocalExecutor:
    """A process for each of ``names``, with its share of the packs."""

    poll = 0.2

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def share(self, packs: list[Pack], weights: Sequence[int]) -> list[Task]:
        shares = spread(weights, len(self.names))
        given = [(name, [packs[place] for place in share]) for name, share in zip(self.names, shares, strict=True)]
        return [Task(own, handle=_Worker(name)) for name, own in given if own]

    def retry(self, task: Task, packs: list[Pack]) -> list[Task]:
        return [Task(packs, handle=_Worker(task.handle.device))]

    def adopt(self, waiting: Sequence[Job]) -> list[Task]:
        return []

    def start(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            _start(task)

    def over(self, tasks: Sequence[Task]) -> list[tuple[Task, End]]:
        return [(task, _end(task)) for task in tasks if task.handle.process.poll() is not None]

    def stop(self, tasks: Sequence[Task], number: int) -> None:
        started = [task.handle for task in tasks if task.handle.process is not None]
        for worker in started:
            worker.process.send_signal(number)
        for worker in started:
            worker.process.wait()
            worker.asked.unlink(missing_ok=True)

    def close(self) -> None:
        return None


def _start(task: Task) -> None:
    worker: _Worker = task.handle
    path = task.packs[0][0].folder.parent / f"device-{worker.device}.json"
    path.write_text(json.dumps({**tasks.content(task.packs, task.before), "parent": os.getpid()}))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": worker.device}
    command = [sys.executable, "-m", "loralab.scheduling.workers", str(path)]
    worker.asked = path
    with held_back():
        worker.process = subprocess.Popen(command, env=environment)
    task.name, task.log = f"process {worker.process.pid} of device {worker.device}", str(path.with_suffix(".log"))


def _end(task: Task) -> End:
    worker: _Worker = task.handle
    worker.asked.unlink(missing_ok=True)  # type: ignore[union-attr]
    code = worker.process.returncode
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        return End(f"signal {code - 128} stopped it", "cancelled")
    return End(f"signal {-code} ended it" if code < 0 else f"it ended with code {code}")


def main(path: Path) -> int:
    """The process of one device. It ends, as by SIGTERM, with the process that has started it."""
    file, terminal = LogFile(path.with_suffix(".log")), logging.StreamHandler()
    terminal.setLevel(logging.WARNING)
    try:
        listen()
        task = json.loads(path.read_text())
        path.unlink(missing_ok=True)  # its settings may hold secrets, and a parent that is killed removes nothing
        end_with(task["parent"])
        return tasks.perform(task, [file, terminal])
    except Interrupted as stopped:
        return stopped.exit_code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

"""Packs on several GPUs of this machine: a process for each card, which sees that card alone and keeps its own base.

CUDA_VISIBLE_DEVICES is set before the process starts.
"""

import gc
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.errors import ConfigError, Interrupted
from loralab.records.log_file import LogFile
from loralab.scheduling import tasks
from loralab.scheduling.executors import End, Pack, Task
from loralab.scheduling.job import Job
from loralab.scheduling.packs import spread
from loralab.signals import end_with, held_back, listen, unlisten

log = logging.getLogger(__name__)

STAND_IN = (
    "LORALAB_DEVICES"  # names of devices in place of torch's: some of the cards, one twice; any for tests on CPUs
)
PATIENCE_S = 300.0  # what a process may take to write its checkpoints once it is told to stop; then it is killed


def devices(device: str) -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be set to, one entry a process; empty where there is one or none. Raises
    ConfigError where LORALAB_DEVICES names a card that is not there."""
    names = asked = _split(os.environ.get(STAND_IN, ""))
    if device == "cuda":
        import torch

        count = torch.cuda.device_count()
        cards = _split(os.environ.get("CUDA_VISIBLE_DEVICES", ""))[:count] or [str(index) for index in range(count)]
        names = asked if STAND_IN in os.environ else cards
        # one named by its UUID says for itself which it is, and its process that it is not there
        if missing := [name for name in asked if name.isdecimal() and name not in cards]:
            raise ConfigError(
                f"{STAND_IN}={os.environ[STAND_IN]} names {', '.join(missing)}, and torch sees {count} CUDA device"
                f"{'s' * (count != 1)}; valid: some of {','.join(cards) or 'none'}, or {STAND_IN} not set"
            )
    return names if len(names) > 1 else []


def _split(names: str) -> list[str]:
    return [name for name in names.replace(" ", "").split(",") if name]


@dataclass
class _Worker:
    """``label``: of its files; the device, and of two processes on one device their number. ``threads``: its share of
    the processor's cores. ``asked``: the file with its trials, whose settings may hold secrets: it goes with the
    process."""

    device: str
    label: str
    threads: int
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
        threads = max(1, _cores() // sum(bool(own) for _, own in given)) if packs else 1
        labels = [
            name if not self.names[:place].count(name) else f"{name}-{self.names[:place].count(name) + 1}"
            for place, name in enumerate(self.names)
        ]
        workers = zip(labels, given, strict=True)
        return [Task(own, handle=_Worker(name, label, threads)) for label, (name, own) in workers if own]

    def retry(self, task: Task, packs: list[Pack]) -> list[Task]:
        old: _Worker = task.handle
        return [Task(packs, handle=_Worker(old.device, old.label, old.threads))]

    def adopt(self, waiting: Sequence[Job]) -> list[Task]:
        return []

    def start(self, tasks: Sequence[Task]) -> None:
        _leave_the_devices()
        for task in tasks:
            _start(task)

    def over(self, tasks: Sequence[Task]) -> list[tuple[Task, End]]:
        return [(task, _end(task)) for task in tasks if task.handle.process.poll() is not None]

    def stop(self, tasks: Sequence[Task], number: int) -> None:
        started = [task.handle for task in tasks if task.handle.process is not None]
        for worker in started:
            worker.process.send_signal(number)
        deadline = time.monotonic() + PATIENCE_S
        for worker in started:
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.warning("process %d of device %s does not stop, and is killed", worker.process.pid, worker.label)
                worker.process.kill()
            worker.asked.unlink(missing_ok=True)

    def close(self) -> None:
        return None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _leave_the_devices() -> None:
    """Gives back what this process has used of a device, to sample its data from the base, say."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def _start(task: Task) -> None:
    worker: _Worker = task.handle
    path = task.packs[0][0].folder.parent / f"device-{worker.label}.json"
    path.write_text(json.dumps({**tasks.content(task.packs, task.before), "parent": os.getpid()}))
    # all cores for each would have n times as many threads as cores
    threads = {"OMP_NUM_THREADS": str(worker.threads), "MKL_NUM_THREADS": str(worker.threads)}
    environment = {**threads, **os.environ, "CUDA_VISIBLE_DEVICES": worker.device}
    command = [sys.executable, "-m", "loralab.scheduling.workers", str(path)]
    worker.asked = path
    with held_back():
        worker.process = subprocess.Popen(command, env=environment)
    task.name, task.log = f"process {worker.process.pid} of device {worker.label}", str(path.with_suffix(".log"))


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
    code = main(Path(sys.argv[1]))
    unlisten()
    sys.exit(code)

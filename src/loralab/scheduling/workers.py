"""Packs on several GPUs: a process for each card, which sees that card alone and keeps its own base.

CUDA_VISIBLE_DEVICES is set before the process starts. Results come back as records only: the parent reads them, logs
a line for each trial and runs itself what a process that died has not finished.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.errors import ArtifactError, Interrupted
from loralab.records import record
from loralab.records.log_file import LogFile
from loralab.records.secrets import MaskedFormatter
from loralab.scheduling.job import Job
from loralab.scheduling.signals import end_with, held_back, listen

log = logging.getLogger(__name__)

STAND_IN = "LORALAB_DEVICES"  # names of devices in place of torch's, for tests
SETTLED = ("completed", "diverged", "pruned")  # anything else may be tried again, alone
POLL = 0.2  # seconds


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
class Worker:
    """A process and the trials it has not settled yet."""

    device: str
    process: subprocess.Popen[bytes]
    waiting: dict[str, Job]  # by their trials
    before: dict[str, int]  # trial -> time of the record it had
    asked: Path  # the file with its trials, whose settings may hold secrets: it goes with the process

    def settled(self) -> Iterator[tuple[Job, dict[str, Any]]]:
        """Trials with a new record that is final; once the process has ended, with any new record.

        They are removed from ``waiting``.
        """
        ended = self.process.poll() is not None
        for job, stored, _ in news(self.waiting.values(), self.before):
            if stored["status"] in SETTLED or (ended and stored["status"] != "running"):
                del self.waiting[job.trial]
                yield job, stored


def run(
    shares: Sequence[Sequence[Sequence[Job]]],
    names: Sequence[str],
    close: Callable[[Job, dict[str, Any]], None],
) -> None:
    """Runs ``shares``, the packs of each device of ``names``, and calls ``close`` for each trial with a final record.

    Returns when all processes have ended. An exception stops them, waits for them and is raised again.
    """
    workers = [_start(list(packs), name) for packs, name in zip(shares, names, strict=True) if packs]
    try:
        while True:
            ended = all(worker.process.poll() is not None for worker in workers)
            for worker in workers:
                for job, stored in worker.settled():
                    close(job, stored)
            if ended:
                break
            time.sleep(POLL)
    except BaseException as error:
        number = getattr(error, "exit_code", 0) - 128 if isinstance(error, Interrupted) else signal.SIGTERM
        for worker in workers:
            worker.process.send_signal(number)
        for worker in workers:
            worker.process.wait()
        raise
    finally:
        for worker in workers:
            worker.asked.unlink(missing_ok=True)
    for worker in workers:
        if worker.waiting:
            code = worker.process.returncode
            text = "the process of device %s ended with code %d; %d of its trials run in this one"
            log.warning(text, worker.device, code, len(worker.waiting))


def _start(packs: Sequence[Sequence[Job]], name: str) -> Worker:
    jobs = [job for pack in packs for job in pack]
    path = jobs[0].folder.parent / f"device-{name}.json"
    asked = {"packs": [[job.as_json() for job in pack] for pack in packs], "parent": os.getpid()}
    path.write_text(json.dumps(asked))
    before = {job.trial: written(job) for job in jobs}
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": name}
    with held_back():
        process = subprocess.Popen([sys.executable, "-m", "loralab.scheduling.workers", str(path)], env=environment)
    log.info("device %s: %d trials in %d packs, process %d", name, len(jobs), len(packs), process.pid)
    return Worker(name, process, {job.trial: job for job in jobs}, before, path)


def written(job: Job) -> int:
    """When the job's record was written, in ns; 0 where there is none."""
    path = job.folder / record.RESULT
    return path.stat().st_mtime_ns if path.is_file() else 0


def news(waiting: Iterable[Job], before: Mapping[str, int]) -> Iterator[tuple[Job, dict[str, Any], int]]:
    """Those of ``waiting`` whose record was written since ``before`` {trial: ``written`` then}, with it and when."""
    for job in list(waiting):
        when = written(job)
        if when == before[job.trial]:
            continue
        try:
            stored = record.read(job.folder)
        except ArtifactError:  # it is not whole
            continue
        yield job, stored, when


def main(path: Path) -> int:
    """The process of one device: its packs one after the other, over a base that stays loaded. It ends, as by SIGTERM,
    with the process that has started it."""
    file, terminal = LogFile(path.with_suffix(".log")), logging.StreamHandler()
    terminal.setLevel(logging.WARNING)
    logging.basicConfig(level=logging.INFO, handlers=[file, terminal])
    for handler in (file, terminal):
        handler.setFormatter(MaskedFormatter("%(asctime)s %(message)s"))
    try:
        listen()
        content = json.loads(path.read_text())
        path.unlink(missing_ok=True)  # its settings may hold secrets, and a parent that is killed removes nothing
        end_with(content["parent"])
        log.info("CUDA_VISIBLE_DEVICES=%s", os.environ.get("CUDA_VISIBLE_DEVICES"))
        from loralab.scheduling.session import Session
        from loralab.scheduling.sweep import Sweep

        packs = [[Job.from_json(stored) for stored in pack] for pack in content["packs"]]
        Sweep(path.parent, [], Session(fresh=False, many=True).runner).run_packs(packs)
    except Interrupted as stopped:
        return stopped.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

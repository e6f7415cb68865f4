"""Packs on several GPUs: a process for each card, which sees that card alone and keeps its own base.

CUDA_VISIBLE_DEVICES is set before the process starts. Records are the only way back: the parent reads them, says each
trial's line, and runs itself what a process that died has left.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.errors import ArtifactError, Interrupted
from loralab.records import record
from loralab.scheduling.job import Job

log = logging.getLogger(__name__)

STAND_IN = "LORALAB_DEVICES"  # names of devices in place of torch's, for tests
SETTLED = ("completed", "diverged", "pruned")  # anything else may be tried again, alone
POLL = 0.2  # seconds


def devices(device: str) -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be set to, one entry a card; empty where there is one or none."""
    given = os.environ.get(STAND_IN)
    if given is None and device == "cuda":
        import torch

        count = torch.cuda.device_count()
        named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        given = ",".join(named[:count] if named else map(str, range(count)))
    found = [name for name in (given or "").split(",") if name]
    return found if len(found) > 1 else []


@dataclass
class Worker:
    """A process and the trials it has not settled yet."""

    device: str
    process: subprocess.Popen[bytes]
    waiting: list[Job]
    before: dict[str, int]  # trial -> time of the record it had

    def settled(self) -> Iterator[tuple[Job, dict[str, Any]]]:
        """Trials whose records are new and final; all that are new, once the process has ended."""
        ended = self.process.poll() is not None
        for job in list(self.waiting):
            if _written(job) == self.before[job.trial]:
                continue
            try:
                done = record.read(job.folder)
            except ArtifactError:
                continue
            if done["status"] in SETTLED or (ended and done["status"] != "running"):
                self.waiting.remove(job)
                yield job, done


def run(
    shares: Sequence[Sequence[Sequence[Job]]],
    names: Sequence[str],
    fresh: bool,
    tell: Callable[[Job, dict[str, Any]], None],
) -> None:
    """``shares``: the packs of each device of ``names``. Returns when all processes have ended."""
    workers = [_start(list(packs), name, fresh) for packs, name in zip(shares, names, strict=True) if packs]
    try:
        while True:
            ended = all(worker.process.poll() is not None for worker in workers)
            for worker in workers:
                for job, done in worker.settled():
                    tell(job, done)
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
    for worker in workers:
        if worker.waiting:
            code = worker.process.returncode
            text = "the process of device %s ended with code %d; %d of its trials run in this one"
            log.warning(text, worker.device, code, len(worker.waiting))


def _start(packs: Sequence[Sequence[Job]], name: str, fresh: bool) -> Worker:
    jobs = [job for pack in packs for job in pack]
    path = jobs[0].folder.parent / f"device-{name}.json"
    path.write_text(json.dumps({"fresh": fresh, "packs": [[job.as_json() for job in pack] for pack in packs]}))
    before = {job.trial: _written(job) for job in jobs}
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": name}
    process = subprocess.Popen([sys.executable, "-m", "loralab.scheduling.workers", str(path)], env=environment)
    log.info("device %s: %d trials in %d packs, process %d", name, len(jobs), len(packs), process.pid)
    return Worker(name, process, jobs, before)


def _written(job: Job) -> int:
    path = job.folder / record.RESULT
    return path.stat().st_mtime_ns if path.is_file() else 0


def main(path: Path) -> int:
    """The process of one device: its packs one after the other, over a base that stays loaded."""
    from loralab.scheduling.session import Session
    from loralab.scheduling.signals import listen
    from loralab.scheduling.sweep import Sweep

    listen()
    file, terminal = logging.FileHandler(path.with_suffix(".log")), logging.StreamHandler()
    terminal.setLevel(logging.WARNING)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=[file, terminal])
    content = json.loads(path.read_text())
    log.info("CUDA_VISIBLE_DEVICES=%s", os.environ.get("CUDA_VISIBLE_DEVICES"))
    try:
        packs = [[Job.from_json(stored) for stored in pack] for pack in content["packs"]]
        session = Session(fresh=content["fresh"], many=True)
        Sweep(path.parent, [], session.fresh, session.runner).run_packs(packs)
    except Interrupted as stopped:
        return stopped.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

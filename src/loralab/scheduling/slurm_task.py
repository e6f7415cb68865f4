"""A task in its Slurm job: it is the one owner of its requeueing.

SIGUSR2 comes before the time limit, SIGTERM with a preemption: trials write checkpoints, and the task puts itself back
into the queue. At its last time limit it trains on to the end. A job that is being cancelled is not requeued.
"""

import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from loralab.errors import Interrupted
from loralab.scheduling import slurm_commands, tasks
from loralab.signals import after_the_step, listen

log = logging.getLogger(__name__)

EARLY = 90.0  # seconds that Slurm may send a signal before its time, and a job takes to begin


class SlurmTask:
    """What submitit calls in the job; ``content`` is that of ``tasks.content``."""

    def __init__(self, content: dict[str, Any], timeout_min: int, delay: int, max_num_timeout: int) -> None:
        """``delay``: seconds before the limit of ``timeout_min`` at which SIGUSR2 comes."""
        self.content, self.max_num_timeout = content, max_num_timeout
        self.limit = 60 * timeout_min - delay - EARLY  # seconds from which SIGUSR2 means the time limit

    def __call__(self) -> None:
        """Runs what is left of the task. Leaves by SystemExit where it was stopped, so that it has no result."""
        os.environ.pop("SLURM_NTASKS", None)  # else Lightning sees the job, and requeues it too
        self.begun, self.requeues = time.monotonic(), False
        listen()
        signal.signal(signal.SIGUSR2, after_the_step(self._told))
        code = tasks.perform(self.content, [logging.StreamHandler()])
        if code:
            self._leave(code)

    def _told(self, number: int, frame: Any) -> None:
        """SIGUSR2: the time limit is near, or the task has to make room."""
        timed_out = time.monotonic() - self.begun >= self.limit
        count = self._timeouts()
        if timed_out and count >= self.max_num_timeout:
            log.warning("the last of %d time limits is near: the task goes on until Slurm ends it", count + 1)
            return
        if timed_out:
            self._notes().write_text(str(count + 1))
        self.requeues = True
        for other in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):  # records are being written from now on
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(number)

    def _leave(self, code: int) -> None:
        job = job_id()
        told = self.requeues or (code == 128 + signal.SIGTERM and _is_preempted(job))
        if told:
            log.warning("task %s goes back into the queue", job)
            try:
                slurm_commands.requeue(job)
            except slurm_commands.SlurmError as error:
                log.warning("task %s could not be requeued: %s", job, error)
        sys.exit(code)

    def _notes(self) -> Path:
        """The file with the number of time limits that the task has reached."""
        return Path(os.environ["SUBMITIT_FOLDER"]) / f"{job_id()}_timeouts.txt"

    def _timeouts(self) -> int:
        try:
            return int(self._notes().read_text())
        except (OSError, ValueError):
            return 0


def job_id() -> str:
    """Of the job that this process is in: 12, or 12_3 for a task of an array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def _is_preempted(job: str) -> bool:
    """Whether SIGTERM was no end of the job: a preempted one has its grace time in the state in which it ran, and one
    that is cancelled, or out of time, is completing."""
    found = slurm_commands.states([job]) or {}
    return found.get(job, ("", ""))[0] == "RUNNING"

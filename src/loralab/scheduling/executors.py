"""Packs that run in other processes, by whatever starts them: a GPU of this machine, Slurm or Ray.

Results come back as records only. What a process that dies has left is tried once more: trials that were running each
alone, since one of them may be the cause. A trial whose process dies twice has failed.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from signal import SIGTERM
from typing import Any, Literal, Protocol

from loralab.errors import ArtifactError, Interrupted, LoralabError
from loralab.records import record
from loralab.records.lock import hold
from loralab.scheduling.job import Job, Record
from loralab.scheduling.tasks import is_over
from loralab.scheduling.watching import news, written

log = logging.getLogger(__name__)

SETTLED = ("completed", "diverged", "pruned")  # anything else may be run again by the process that wrote it
CHANCES = 2  # deaths of its process after which a trial has failed
Pack = list[Job]


@dataclass(frozen=True)
class End:
    """How the process of a task has ended, and what of its trials becomes that are not over.

    ``verdict``: died: they run again, once; excused: again, however often, as after a preemption; cancelled: they stay
    interrupted; failed: they have failed. ``error``: of those that have failed, with ``why`` in it.
    """

    why: str
    verdict: Literal["died", "excused", "cancelled", "failed"] = "died"
    error: type[LoralabError] = ArtifactError


@dataclass(eq=False)
class Task:
    """Packs that one process runs, one after the other; ``waiting``: the trials whose end is not known yet."""

    packs: list[Pack]
    before: dict[str, int] = field(default_factory=dict)  # {trial: when its record was written, as the task began}
    name: str = ""
    log: str = ""  # the file with what its process says
    handle: Any = None  # the executor's own; None: it has not been started

    def __post_init__(self) -> None:
        self.waiting = [job for pack in self.packs for job in pack]
        self.before = self.before or {job.trial: written(job) for job in self.waiting}


class Executor(Protocol):
    """Starts tasks and says which have ended."""

    poll: float  # seconds between two looks at the records

    def share(self, packs: list[Pack], weights: Sequence[int]) -> list[Task]:
        """The tasks for ``packs``; ``weights``: tokens of each."""

    def retry(self, task: Task, packs: list[Pack]) -> list[Task]:
        """The tasks for what ``task``, which has ended, left."""

    def adopt(self, waiting: Sequence[Job]) -> list[Task]:
        """Tasks of an earlier call that still wait or run, with those of ``waiting`` that they bring."""

    def start(self, tasks: Sequence[Task]) -> None:
        """Starts them all; sets their ``name``, ``log`` and ``handle``. Raises LoralabError where they cannot be."""

    def over(self, tasks: Sequence[Task]) -> list[tuple[Task, End]]:
        """Those of ``tasks`` that have ended."""

    def stop(self, tasks: Sequence[Task], number: int) -> None:
        """Ends those of ``tasks`` that were started, as by the signal ``number``, and waits for what they write."""

    def close(self) -> None:
        """Called once, at the end."""


def run(
    executor: Executor,
    packs: Sequence[Pack],
    weights: Sequence[int],
    close: Callable[[Job, Record], None],
    show: Callable[[Job, str], None],
) -> None:
    """Runs ``packs``; ``show`` is given the status of trials that are on their way, ``close`` once of each its final
    record. Returns when all have one. An exception stops the tasks, waits for what they write and is raised again."""
    loop = _Loop(executor, close, show)
    try:
        loop.tasks += executor.adopt([job for pack in packs for job in pack])
        adopted = {job.trial for task in loop.tasks for job in task.waiting}
        left = [[job for job in pack if job.trial not in adopted] for pack in packs]
        kept = [place for place, pack in enumerate(left) if pack]
        if kept:
            loop.start(executor.share([left[place] for place in kept], [weights[place] for place in kept]))
        while loop.tasks:
            loop.look()
    except BaseException as error:
        executor.stop(loop.tasks, error.exit_code - 128 if isinstance(error, Interrupted) else int(SIGTERM))
        loop.mark_interrupted()
        raise
    finally:
        executor.close()


class _Loop:
    def __init__(
        self, executor: Executor, close: Callable[[Job, Record], None], show: Callable[[Job, str], None]
    ) -> None:
        self.executor, self.close, self.show = executor, close, show
        self.tasks: list[Task] = []
        self.deaths: Counter[str] = Counter()  # {trial: how often its process has died}

    def start(self, tasks: list[Task]) -> None:
        self.tasks += tasks  # at once: what is started when an interruption comes must be stopped
        self.executor.start(tasks)
        for task in tasks:
            count = len(task.waiting)
            log.info("%s: %d trial%s in %d pack%s", task.name, count, _s(count), len(task.packs), _s(len(task.packs)))

    def look(self) -> None:
        """One look at states and records; what has died is started again."""
        over = self.executor.over(self.tasks)  # before the records: what a task wrote last is not missed
        for task in self.tasks:
            self._read(task)
        again = [new for task, end in over for new in self._ended(task, end)]
        ended = [task for task, _ in over]
        self.tasks = [task for task in self.tasks if task.waiting and task not in ended]
        if again:
            self._start_again(again)
        elif self.tasks:
            time.sleep(self.executor.poll)

    def mark_interrupted(self) -> None:
        """Of trials whose process was stopped before it could say so itself."""
        for task in self.tasks:
            for job, _, _ in news(task.waiting, task.before):
                _leave(job, "its process was stopped")

    def _read(self, task: Task) -> None:
        for job, stored, _ in news(task.waiting, task.before):
            if stored["status"] in SETTLED or job.has_paused(stored):
                self._take(task, job, stored)
            else:
                self.show(job, stored["status"])

    def _take(self, task: Task, job: Job, stored: Record) -> None:
        task.waiting.remove(job)
        self.close(job, stored)

    def _ended(self, task: Task, end: End) -> list[Task]:
        """The tasks for what has to run again of ``task``, whose process has ended."""
        begun = []
        for job, stored, _ in news(task.waiting, task.before):
            if is_over(job, stored):
                self._take(task, job, stored)
            else:
                begun.append(job)
                job.fresh = False  # it goes on from its checkpoint
        if end.verdict == "excused":
            return self._again(task, end, [])
        suspects = begun or list(task.waiting)
        if end.verdict == "died":
            self.deaths.update(job.trial for job in suspects)
            lost = [job for job in suspects if self.deaths[job.trial] >= CHANCES]
        else:
            lost = list(task.waiting)
        for job in lost:
            self._take(task, job, _given_up(task, job, end))
        return self._again(task, end, [job for job in suspects if job in task.waiting])

    def _again(self, task: Task, end: End, alone: Sequence[Job]) -> list[Task]:
        """Tasks for the trials that wait, those of ``alone`` in packs of one."""
        rest = [[job for job in pack if job in task.waiting and job not in alone] for pack in task.packs]
        packs = [pack for pack in [*([job] for job in alone), *rest] if pack]
        if not packs:
            return []
        count = len(task.waiting)
        text = "%s has ended: %s; %d of its trials run%s again%s"
        log.warning(text, task.name, end.why, count, "s" * (count == 1), ", those that it ran alone" * bool(alone))
        for job in task.waiting:
            _leave(job, f"{task.name} has ended: {end.why}")
            self.show(job, "pending")
        return self.executor.retry(task, packs)

    def _start_again(self, tasks: list[Task]) -> None:
        try:
            self.start(tasks)
        except LoralabError as error:
            for task in tasks:
                for job in list(task.waiting):
                    self._take(task, job, job.refuse(error))
            self.tasks = [task for task in self.tasks if task.waiting]


def _given_up(task: Task, job: Job, end: End) -> Record:
    """The final record of a trial that does not run again. It is not written where a process still holds the folder."""
    twice = "its process died twice, at last as " if end.verdict == "died" else ""
    said = f"; what it said: {task.log}" if task.log else ""
    error = end.error(f"{twice}{task.name}: {end.why}{said}")
    try:
        with hold(job.folder):
            if end.verdict != "cancelled":
                return job.refuse(error)
            stored = record.read_if_whole(job.folder) or job.refusal(error)
            stored.update(status="interrupted", error=str(error), exit_code=128 + int(SIGTERM))
            record.write(job.folder, stored)
            return stored
    except ArtifactError as in_use:
        return job.refusal(in_use)


def _leave(job: Job, why: str) -> None:
    """The record of a trial whose process has gone no longer says that it runs."""
    with suppress(ArtifactError), hold(job.folder):
        stored = record.read(job.folder)
        if stored["status"] == "running":
            record.write(job.folder, {**stored, "status": "interrupted", "error": why})


def _s(count: int) -> str:
    return "s" * (count != 1)

"""Watches the records of trials that other processes run."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from loralab.errors import ArtifactError
from loralab.records import record
from loralab.scheduling.job import Job, Record
from loralab.scheduling.sweep_file import status_of

POLL = 0.5  # seconds, and
SHARE = 0.05  # of the time, at most, goes into looking: very many trials are looked at less often


def written(job: Job) -> int:
    """When the job's record was written, in ns; 0 where there is none."""
    path = job.folder / record.RESULT
    return path.stat().st_mtime_ns if path.is_file() else 0


def news(waiting: Iterable[Job], before: Mapping[str, int]) -> Iterator[tuple[Job, Record, int]]:
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


@contextmanager
def watched(jobs: Sequence[Job], close: Callable[[Job, Record], None], begin: Callable[[Job], None]) -> Iterator[None]:
    """Inside, ``close`` is called for each of ``jobs`` as its new, final record appears and ``begin`` when it runs.

    Both are called in another thread. After a regular end ``close`` has been called for all: for one that has left no
    final record with a failure, which is not written, because its process may still live.
    """
    watch = _Watch(jobs, close, begin)
    ended = threading.Event()
    thread = threading.Thread(target=watch.until, args=(ended,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    watch.look()
    watch.give_up()


class _Watch:
    def __init__(self, jobs: Sequence[Job], close: Callable[[Job, Record], None], begin: Callable[[Job], None]) -> None:
        self.waiting, self.close, self.begin = {job.trial: job for job in jobs}, close, begin
        self.before = {job.trial: written(job) for job in jobs}

    def until(self, ended: threading.Event) -> None:
        took = 0.0
        while not ended.wait(max(POLL, took / SHARE)):
            begun = time.monotonic()
            self.look()
            took = time.monotonic() - begun

    def look(self) -> None:
        for job, stored, when in news(self.waiting.values(), self.before):
            if stored["status"] == "running":
                self.before[job.trial] = when
                self.begin(job)
            else:
                del self.waiting[job.trial]
                self.close(job, stored)

    def give_up(self) -> None:
        for job in self.waiting.values():
            folder = job.folder
            reason = (
                f"there is no result in {folder}: its process died or was never started; valid: loralab sweep --resume"
            )
            refused = job.refusal(ArtifactError(f"{reason} {folder.parent}"))
            if status_of(folder) == "interrupted":  # it was begun, and its process is gone
                refused["status"] = "interrupted"
            self.close(job, refused)

"""Packs as tasks of a Slurm array, submitted by submitit. Their states are squeue's; accounting is not needed.

The ids of jobs are in ``slurm.json`` of the sweep folder as long as they wait or run: a later call waits for them
instead of submitting their trials again.
"""

import importlib.util
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loralab.errors import ArtifactError, ConfigError, OutOfMemory
from loralab.records import record
from loralab.scheduling import slurm_commands, tasks
from loralab.scheduling.executor_settings import Slurm
from loralab.scheduling.executors import End, Pack, Task
from loralab.scheduling.job import Job
from loralab.scheduling.slurm_task import SlurmTask
from loralab.scheduling.watching import news
from loralab.signals import held_back

log = logging.getLogger(__name__)

FOLDER = "slurm"  # in the sweep folder: the batch script, what tasks said
FILE = "slurm.json"
ASKED_EVERY = 5.0  # seconds between two questions to Slurm
SLOW_DISK = 60.0  # seconds in which what a completed job has written becomes visible here
STOPPING = 90.0  # seconds for cancelled tasks to write where they stand
USUAL = {"None", "Priority", "Resources", "JobArrayTaskLimit", "BeginTime", "Cleaning", "Dependency"}  # of waiting


def check(settings: Slurm) -> None:
    """Raises ConfigError where tasks of ``settings`` cannot be submitted from here. Nothing is submitted."""
    if importlib.util.find_spec("submitit") is None:
        raise ConfigError("hydra.launcher.executor=slurm needs submitit; valid: pip install 'loralab[slurm]'")
    slurm_commands.check_there()
    slurm_commands.check_partition(settings.partition, settings.timeout_min)
    slurm_commands.check_job(settings.sbatch())


class SlurmExecutor:
    """Array tasks for the packs of the sweep in ``folder``."""

    poll = 1.0

    def __init__(self, settings: Slurm, folder: Path) -> None:
        self.settings, self.folder, self.largest = settings, folder, slurm_commands.largest_array()
        self.live: list[Task] = []
        self._states: dict[str, tuple[str, str]] | None = None
        self._asked = self._answered = 0.0
        self._since: dict[str, float] = {}  # {job: since when it is seen as ended}
        self._said: set[str] = set()

    def share(self, packs: list[Pack], weights: Sequence[int]) -> list[Task]:
        """A task for each pack; of more packs than an array may have tasks, several to a task."""
        count = min(len(packs), self.largest)
        return [Task(packs[first::count]) for first in range(count)]

    def retry(self, task: Task, packs: list[Pack]) -> list[Task]:
        return [Task([pack]) for pack in packs]

    def adopt(self, waiting: Sequence[Job]) -> list[Task]:
        """Those of ``slurm.json`` that Slurm still has, with the trials that they bring."""
        entries = queued(self.folder)
        by_trial = {job.trial: job for job in waiting}
        for entry in entries:
            jobs = [by_trial[trial] for trial in entry["before"] if trial in by_trial]
            if fresh := [job.trial for job in jobs if job.fresh]:
                raise ArtifactError(
                    f"trial {fresh[0]} is in Slurm's job {entry['job']}, which waits or runs; valid: without --fresh,"
                    f" which waits for it, or scancel {entry['job']} first"
                )
            if jobs:
                name = f"Slurm's job {entry['job']}"
                self.live.append(Task([jobs], entry["before"], name, entry["log"], entry["job"]))
                log.info("%s of an earlier call waits or runs: its %d trials are waited for", name, len(jobs))
        return list(self.live)

    def start(self, tasks: Sequence[Task]) -> None:
        for first in range(0, len(tasks), self.largest):
            self._submit(tasks[first : first + self.largest])

    def _submit(self, array: Sequence[Task]) -> None:
        given = [self._callable(task) for task in array]
        with held_back():  # a job whose id is not known could not be cancelled
            try:
                jobs = self._submitit().submit_array(given)
            except Exception as error:  # submitit raises several kinds, with what sbatch has said
                text = " ".join(str(error).split())[:500]
                raise ConfigError(f"Slurm takes no jobs of this sweep: {text}") from error
            for task, job in zip(array, jobs, strict=True):
                task.handle, task.name, task.log = job.job_id, f"Slurm's job {job.job_id}", str(job.paths.stderr)
            self.live += array
            self._remember()
        self._answered = 0.0

    def _callable(self, task: Task) -> SlurmTask:
        settings = self.settings
        content = tasks.content(task.packs, task.before)
        return SlurmTask(content, settings.timeout_min, settings.delay, settings.max_num_timeout)

    def _submitit(self) -> Any:
        import submitit

        settings, folder = self.settings, self.folder / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)  # tasks hold their trials' settings, which may be secret
        executor = submitit.SlurmExecutor(folder=folder)
        words = settings.sbatch()
        executor.update_parameters(
            job_name=f"loralab-{self.folder.name}",
            time=words.pop("time"),
            ntasks_per_node=1,
            array_parallelism=settings.array_parallelism,
            signal_delay_s=settings.delay,
            setup=settings.setup or None,
            additional_parameters={"requeue": True, **words},
        )
        return executor

    def over(self, tasks: Sequence[Task]) -> list[tuple[Task, End]]:
        """Those that Slurm says have ended, in two answers in a row: what is requeued ends for a moment."""
        self._forget([task for task in self.live if task not in tasks])
        if not tasks or time.monotonic() - self._asked < ASKED_EVERY:
            return []
        self._asked = time.monotonic()
        found = slurm_commands.states([task.handle for task in tasks])
        if found is None:
            self._say("Slurm does not answer; its jobs are waited for")
            return []
        self._said.discard("Slurm does not answer; its jobs are waited for")
        ended = []
        for task in tasks:
            state, reason = found.get(task.handle, ("", ""))
            if state and state not in slurm_commands.ENDED:
                self._since.pop(task.handle, None)
                if state == "PENDING" and reason not in USUAL:
                    self._say(f"{task.name} waits in Slurm's queue: {reason}")
                continue
            first = self._since.setdefault(task.handle, self._asked)
            patience = SLOW_DISK if state == "COMPLETED" and not _has_told(task) else ASKED_EVERY
            if self._asked - first >= patience:
                ended.append((task, _end(state or slurm_commands.accounted(task.handle), self.settings)))
        self._forget([task for task, _ in ended])
        return ended

    def stop(self, tasks: Sequence[Task], number: int) -> None:
        """Cancels the jobs: their tasks write checkpoints, and end."""
        jobs = [task.handle for task in tasks if task.handle]
        if not jobs:
            return
        log.warning("cancelling %d jobs of Slurm's: scancel %s", len(jobs), " ".join(jobs))
        try:
            slurm_commands.cancel(jobs)
        except slurm_commands.SlurmError as error:
            log.error("Slurm's jobs could not be cancelled: %s", error)
            return
        end = time.monotonic() + STOPPING
        while time.monotonic() < end:
            found = slurm_commands.states(jobs)
            if found is not None and all(found.get(job, ("COMPLETED", ""))[0] in slurm_commands.ENDED for job in jobs):
                break
            time.sleep(self.poll)
        self._forget(list(tasks))

    def close(self) -> None:
        self._forget([task for task in self.live if not task.waiting])  # their records came before Slurm said so

    def _forget(self, ended: Sequence[Task]) -> None:
        """Jobs that nobody waits for any more: what holds their trials' settings is removed."""
        if not ended:
            return
        self.live = [task for task in self.live if task not in ended]
        for task in ended:
            if task.handle:
                for name in (f"{task.handle}_submitted.pkl", f"{task.handle}_0_result.pkl"):
                    (self.folder / FOLDER / name).unlink(missing_ok=True)
        self._remember()

    def _remember(self) -> None:
        path = self.folder / FILE
        entries = [{"job": task.handle, "log": task.log, "before": task.before} for task in self.live]
        if entries:
            record.replace(path, {"jobs": entries})
        else:
            path.unlink(missing_ok=True)

    def _say(self, text: str) -> None:
        if text not in self._said:
            log.warning("%s", text)
        self._said.add(text)


def queued(folder: Path) -> list[dict[str, Any]]:
    """The jobs of the sweep in ``folder`` that Slurm still has: {job, log, before {trial: time of its record}}. Raises
    ArtifactError where the file that lists them is damaged, or Slurm does not answer."""
    path = folder / FILE
    if not path.is_file():
        return []
    entries = _listed(path)
    found = slurm_commands.states([entry["job"] for entry in entries])
    if found is None:
        raise ArtifactError(
            f"{path} lists jobs that may still run, and Slurm does not answer; valid: a machine where squeue answers,"
            " or that file removed once no such job is left"
        )
    return [entry for entry in entries if entry["job"] in found and found[entry["job"]][0] not in slurm_commands.ENDED]


def _listed(path: Path) -> list[dict[str, Any]]:
    import json

    try:
        entries = json.loads(path.read_text("utf-8"))["jobs"]
        return [{"job": str(one["job"]), "log": str(one["log"]), "before": dict(one["before"])} for one in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path}: damaged: {error}; valid: that file removed once none of its jobs is left"
        ) from error


def check_not_queued(folder: Path, executor: str) -> None:
    """Raises ArtifactError where jobs of an earlier call still have trials of the sweep in ``folder``: another executor
    does not wait for them."""
    if left := [entry["job"] for entry in queued(folder)]:
        raise ArtifactError(
            f"{folder}: Slurm still has the jobs {', '.join(left)} of this sweep, for which executor={executor} does"
            f" not wait; valid: hydra.launcher.executor=slurm, which does, or scancel {' '.join(left)}"
        )


def _has_told(task: Task) -> bool:
    """Whether the end of all its trials is in their records."""
    over = [job for job, stored, _ in news(task.waiting, task.before) if tasks.is_over(job, stored)]
    return len(over) == len(task.waiting)


def _end(state: str, settings: Slurm) -> End:
    if state.startswith("CANCELLED"):
        return End("it was cancelled (scancel)", "cancelled")
    if state == "PREEMPTED":
        return End("it was preempted, and Slurm did not requeue it", "excused")
    if state in ("TIMEOUT", "DEADLINE"):
        times = settings.max_num_timeout + 1
        text = (
            f"it has reached its time limit of {settings.timeout_min} minutes, at most {times} times; valid: a larger"
            " hydra.launcher.timeout_min or max_num_timeout, with which it goes on from its checkpoint"
        )
        return End(text, "failed", ConfigError)
    if state == "OUT_OF_MEMORY":
        text = "Slurm ended it: out of the memory of its job; valid: a larger hydra.launcher.mem_gb"
        return End(text, error=OutOfMemory)
    return End(f"its state is {state}" if state else "Slurm does not know it any more")

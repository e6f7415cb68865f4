"""Runs the trials of a sweep: finished ones are skipped, the others run in packs."""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loralab.config import staleness
from loralab.data.base import FORGETTING
from loralab.errors import ArtifactError, ConfigError, DataError, LoralabError
from loralab.records import record
from loralab.records.shared import share
from loralab.scheduling import executors, opening, ranks
from loralab.scheduling.executor_settings import Local, Settings
from loralab.scheduling.job import Job, Record
from loralab.scheduling.packs import TOKEN_BUDGET, Pack, halves, plan
from loralab.scheduling.sweep_file import SweepFile, status_of
from loralab.scheduling.train_log import train_logs
from loralab.scheduling.watching import watched

if TYPE_CHECKING:
    from loralab.running.runner import Runner
    from loralab.training.specs import TrialSpec

log = logging.getLogger(__name__)

FAILED = ("failed", "out_of_memory", "diverged")
PATIENCE = 15.0  # seconds in which what a killed sweep has left running ends its step


@dataclass(frozen=True)
class PackOptions:
    """How trials are packed, and where packs run. ``token_budget`` (tokens of a pass), ``memory_budget`` (GiB): None
    takes the device's."""

    pack: bool = True
    token_budget: int | None = None
    memory_budget: float | None = None
    executor: Settings = field(default_factory=Local)


class Sweep:
    """Runs packs one after the other. The failure of a trial is in its record and stops no other trial."""

    def __init__(
        self,
        folder: Path,
        jobs: Sequence[Job],
        make_runner: Callable[[], "Runner"],
        failed: bool = False,
        before: Mapping[str, Record] | None = None,
    ) -> None:
        """``jobs``: each trial once. ``make_runner`` is called when a trial has to run: it imports torch. ``failed``:
        only those that have failed run, and of the others that are not finished the record is blank. ``before``: the
        records of earlier rounds of the same sweep."""
        self.folder, self.jobs, self.make_runner = folder, list(jobs), make_runner
        self.failed, self.before = failed, before or {}
        self.records: dict[str, Record] = {}
        self.sweep_file: SweepFile | None = None  # None in a process of one device: the parent writes it

    def run(
        self, header: Mapping[str, Any], options: PackOptions, launch: Callable[[list[Job]], None] | None = None
    ) -> dict[str, Record]:
        """{trial: record} of all jobs. ``header``: what sweep.json says of the sweep; ``launch``: runs trials that are
        not finished elsewhere, each of which leaves its record; None: they run here.

        An interruption leaves as an exception, after every record has been written.
        """
        earlier = [job for job in self.jobs if not job.fresh]
        set_stale_aside(earlier)
        if not self.before:
            _mention_earlier_versions(self.folder, [job for job in earlier if job.finished() is None])
        self.sweep_file = SweepFile(self.folder, header, self.jobs, self.before)
        waiting = self._left([job for job in self.jobs if not self._skip(job)])
        try:
            if launch is None:
                self._run_waiting(waiting, options)
            elif waiting:
                self._launch(waiting, launch)
        finally:  # a sweep that is stopped leaves no trial in doubt
            for job in waiting:
                if job.trial not in self.records:
                    self.sweep_file.set(job.trial, status_of(job.folder))
            self.sweep_file.flush()
        return self.records

    def run_packs(self, packs: Sequence[Sequence[Job]]) -> None:
        """Runs packs that another process has planned; that process writes sweep.json and logs the results."""
        for pack in packs:
            self._run_pack(list(pack))

    def _launch(self, waiting: list[Job], launch: Callable[[list[Job]], None]) -> None:
        with watched(waiting, self._close_elsewhere, lambda job: self._show(job, "running")):
            launch(waiting)

    def _left(self, unfinished: list[Job]) -> list[Job]:
        """What of the unfinished trials is to run."""
        if not self.failed:
            return unfinished
        chosen = [job for job in unfinished if status_of(job.folder) in FAILED]
        names = {job.trial for job in chosen}
        others = [job for job in unfinished if job.trial not in names]
        self.records |= {job.trial: record.blank(job.trial) for job in others}
        log.info(
            "%d trials have failed and run again; %d others are not finished and stay so", len(chosen), len(others)
        )
        return chosen

    def _skip(self, job: Job) -> bool:
        """True if the trial is finished; then its record is taken."""
        stored = None if job.fresh else finished(job, self.make_runner)
        if stored is not None:
            self._close(job, stored, "finished before")
        return stored is not None

    def _close(self, job: Job, stored: Record, state: str = "") -> None:
        """Takes the final record of a trial, updates sweep.json and logs a line that ends in ``state``."""
        self.records[job.trial] = stored = share(stored)
        job.forget()
        if self.sweep_file is None:
            return
        self.sweep_file.set(job.trial, stored["status"])
        metric, value = job.content.get("metric"), job.value(stored)
        score = f"{metric} {value:.4f}" if value is not None else ""
        state = f"{stored['status']}: {stored['error']}" if stored["error"] else state
        count = len(self.sweep_file.places)
        place = f"{self.sweep_file.places[job.trial]:>{len(str(count))}}/{count}"
        log.info("[%s] %s  %s  %s", place, self.sweep_file.label(job), score, state, extra={"trial": job.trial})

    def _run_waiting(self, waiting: list[Job], options: PackOptions) -> None:
        """Runs ``waiting`` in packs: here, or by the executor."""
        for job in waiting:
            job.memory_budget = options.memory_budget
        packs = elsewhere = [[job] for job in waiting]
        weights, device, local = [1] * len(waiting), "cpu", isinstance(options.executor, Local)
        if (len(waiting) > 1 and options.pack) or options.memory_budget is not None:
            planner = _Planner(waiting, self.make_runner(), options)
            for trial, error in planner.refused.items():
                job = planner.jobs[trial]
                self._close(job, job.refuse(error))
            packs, device = planner.packs(), planner.device
            elsewhere = [pack for pack in packs if not (local and planner.takes_all_devices(pack))]
            weights = planner.weights(elsewhere)
        executor = opening.executor(options.executor, self.folder, device, len(elsewhere)) if elsewhere else None
        if executor is not None:
            executors.run(executor, elsewhere, weights, self._close_elsewhere, self._show)
            packs = [pack for pack in packs if pack not in elsewhere]
        for pack in packs:
            self._run_pack(pack)

    def _close_elsewhere(self, job: Job, stored: Record) -> None:
        self._close(job, stored, _clock(stored["time"]["wall_s"] or 0.0))

    def _show(self, job: Job, status: str) -> None:
        if self.sweep_file is not None:
            self.sweep_file.set(job.trial, status)

    def _run_pack(self, jobs: list[Job]) -> None:
        """Runs a pack. One that fails as a whole is run again in halves (memory) or trial by trial."""
        with train_logs({job.trial: job.folder for job in jobs}):
            parts = self._try_pack(jobs)
        for part in parts:
            self._run_pack(part)

    def _try_pack(self, jobs: list[Job]) -> list[list[Job]]:
        """Runs ``jobs`` once, together. The packs that must run again; empty where every record is final."""
        if len(jobs) > 1:
            log.info("%d trials in one pass: %s", len(jobs), ", ".join(job.trial for job in jobs))
        begun = time.monotonic()
        records = self._records_of(jobs)
        again = _rerun(records) if len(jobs) > 1 else []
        for index, (job, stored) in enumerate(zip(jobs, records, strict=True)):
            if index not in again:
                self._close(job, stored, _clock((time.monotonic() - begun) / len(jobs)))
        if not again:
            return []
        undone, first = [jobs[index] for index in again], records[again[0]]
        log.warning("%d trials do not run together: %s", len(undone), first["error"])
        return halves(undone) if first["status"] == "out_of_memory" else [[job] for job in undone]

    def _records_of(self, jobs: list[Job]) -> list[Record]:
        """The records of one pass over ``jobs``, all of them refusals where one cannot be built or is locked."""
        with ExitStack() as stack:
            try:
                for job in jobs:
                    if job.fresh:
                        job.begin_anew()
                specs = [job.spec() for job in jobs]
            except LoralabError as error:
                return [job.refuse(error) for job in jobs]
            try:
                specs = [job.open(stack, PATIENCE) for job in jobs]
            except ArtifactError as error:  # another process runs one of them
                return [job.refusal(error) for job in jobs]
            if self.sweep_file is not None:
                self.sweep_file.begin(job.trial for job in jobs)
            if specs[0].trainer.processes > 1:
                return [ranks.run(jobs[0], specs[0])]
            return self.make_runner().run(specs)


class _Planner:
    """Puts trials into packs. One that cannot be built or read is a pack of its own, and fails when it runs."""

    def __init__(self, waiting: Sequence[Job], runner: "Runner", options: PackOptions) -> None:
        from loralab.scheduling.members import Members, refusal, room
        from loralab.training.epochs import settled

        self.jobs, self.runner = {job.trial: job for job in waiting}, runner
        elsewhere = options.executor.device
        self.device, members = "cpu", Members(elsewhere)
        self.members, self.refused = [], dict[str, LoralabError]()
        self.specs: dict[str, TrialSpec] = {}  # of the trials that can be built and read
        for job in waiting:
            try:
                rows = runner.inputs.rows(job.spec())
                spec = self.specs[job.trial] = settled(job.spec(), rows)
                self.device = elsewhere or spec.trainer.device
                member = members.member(spec, rows)
            except LoralabError:
                continue
            budget = options.memory_budget
            if budget is not None and (error := refusal(member, self.device, budget)):
                self.refused[job.trial] = error
            else:
                self.members.append(member)
        tokens = (options.token_budget or TOKEN_BUDGET[self.device]) if options.pack else 1
        budget = options.memory_budget or options.executor.memory_gib
        known = elsewhere is None or budget  # the memory of another machine is not
        self.planned: list[Pack] = plan(self.members, tokens, room(self.device, budget) if known else math.inf)

    def packs(self) -> list[list[Job]]:
        """All trials but the refused ones; packs in the order of their first trials."""
        self._mention_memory()
        for why, count in Counter(pack.why for pack in self.planned if pack.why).items():
            log.info("%d of %d trials run alone: %s", count, len(self.jobs), why)
        places = {trial: place for place, trial in enumerate(self.jobs)}
        packs = [list(pack.trials) for pack in self.planned]
        placed = {trial for pack in packs for trial in pack}
        packs += [[trial] for trial in self.jobs if trial not in placed and trial not in self.refused]
        return [[self.jobs[trial] for trial in pack] for pack in sorted(packs, key=lambda pack: places[pack[0]])]

    def takes_all_devices(self, pack: Sequence[Job]) -> bool:
        """Whether the pack is one trial in several processes, each with a device."""
        spec = self.specs.get(pack[0].trial)
        return spec is not None and spec.trainer.processes > 1

    def weights(self, packs: Sequence[Sequence[Job]]) -> list[int]:
        """Tokens that each pack is trained with; 1 for a trial whose rows cannot be read."""
        tokens = {member.trial: member.tokens for member in self.members}
        return [
            sum(
                tokens[job.trial] * self.specs[job.trial].trainer.max_steps if job.trial in tokens else 1
                for job in pack
            )
            for pack in packs
        ]

    def _mention_memory(self) -> None:
        """Logs the predicted peak of the pack that needs most by arithmetic; only that one is traced."""
        specs = [[self.specs[trial] for trial in pack.trials] for pack in self.planned]
        if not specs or not specs[0][0].plan.record:
            return
        from loralab.planning.foresee import sentence
        from loralab.planning.plan import estimate

        try:
            largest = max(specs, key=lambda pack: estimate(pack, self.device))
            rows = [self.runner.inputs.rows(spec) for spec in largest]
            predicted = self.runner.foresight.plan(largest, rows, self.device)
        except LoralabError:  # one of them cannot run: reported when it does
            return
        if predicted is not None:
            log.info("%s", sentence(len(largest), predicted))


def finished(job: Job, make_runner: Callable[[], "Runner"]) -> Record | None:
    """The record of an earlier, completed run of the very same trial, with the scores of the test split and of
    data.forgetting that ``job`` asks for; None where it must run. Raises ArtifactError where this run would overwrite
    another trial's result, DataError or ConfigError where data.forgetting cannot be scored."""
    stored = job.finished()
    if stored is not None and stored["status"] == "completed":
        job.tidy()
    if stored is None or not (lacking := staleness.unscored(stored, job.content)):
        return stored
    from loralab.scheduling.tested import add_scores

    try:
        return add_scores(job, make_runner(), lacking)
    except LoralabError as error:
        if FORGETTING in lacking and isinstance(error, DataError | ConfigError):
            raise  # no run would cure it
        log.warning("%s runs again, for its %s scores: %s", job.trial, " and ".join(lacking), error)
        job.set_aside()
        return None


def set_stale_aside(jobs: Sequence[Job]) -> None:
    """Renames the stale records among those of ``jobs``; logs one line for each reason."""
    stale: dict[str, list[Job]] = {}
    for job in jobs:
        if why := job.why_stale():
            stale.setdefault(why, []).append(job)
    for why, outdated in stale.items():
        for job in outdated:
            job.set_aside()
        words = ("is", "runs", "its record stays") if len(outdated) == 1 else ("are", "run", "their records stay")
        log.info(
            "%s %s stale and %s again, %s: %s",
            *(", ".join(job.trial for job in outdated), *words[:2]),
            *(f"{words[2]} as {staleness.KEPT[record.RESULT]}", why),
        )


def _mention_earlier_versions(folder: Path, waiting: Sequence[Job]) -> None:
    old = sum(_schema(place) < record.SCHEMA for place in record.find(folder)) if waiting else 0
    if old:
        log.info(
            "%d trials in %s are of an earlier version of loralab, which named them otherwise: %d run anew, and their"
            " records stay where they are",
            *(old, folder, len(waiting)),
        )


def _schema(folder: Path) -> int:
    try:
        return int(record.read(folder)["schema"])
    except ArtifactError:
        return record.SCHEMA


def _rerun(records: Sequence[Record]) -> list[int]:
    """Indices of the trials of a pack that must run again with fewer others: those that ran out of memory beside
    others, and those that failed with others; a failure of one trial alone is its own."""
    failed = [index for index, stored in enumerate(records) if stored["status"] == "failed"]
    beside = [
        i for i, stored in enumerate(records) if stored["status"] == "out_of_memory" and stored["pack"]["size"] > 1
    ]
    return sorted([*beside, *(failed if len(failed) > 1 else [])])


def _clock(seconds: float) -> str:
    from loralab.training.progress import clock  # imports Lightning: too slow for a wrong word

    return clock(seconds)

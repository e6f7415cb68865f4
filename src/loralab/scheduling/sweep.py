"""What Hydra calls for each configuration: a trial that is finished is skipped, one of a pack runs with its pack."""

import logging
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loralab.config import staleness
from loralab.config.words import forced, quoted
from loralab.errors import ArtifactError, ConfigError, Interrupted, LoralabError
from loralab.records import record
from loralab.scheduling import workers
from loralab.scheduling.jobs import Job
from loralab.scheduling.packs import TOKEN_BUDGET, Member, Pack, halves, plan, spread

log = logging.getLogger(__name__)


@dataclass
class Jobs:
    """The trials of one command line, and what came of them."""

    fresh: bool
    many: bool
    folder: Path | None = None
    records: list[dict[str, Any]] = field(default_factory=list)
    refused: Exception | None = None
    packs: dict[str, list[Job]] = field(default_factory=dict)  # trial -> the jobs it runs with
    ahead: dict[str, tuple[dict[str, Any], float]] = field(default_factory=dict)  # ran before their turn
    memory_budget: float | None = None  # GiB, where the launcher was given one
    done: dict[str, dict[str, Any]] = field(default_factory=dict)  # ran in other processes, and told
    too_large: dict[str, ConfigError] = field(default_factory=dict)  # trials that exceed it alone
    begun: set[str] = field(default_factory=set)
    planned: dict[Path, Job] = field(default_factory=dict)  # run folder -> the job that the launcher has made of it
    _runner: Any = None

    def run(self, arguments: list[str]) -> int:
        """Hands over to Hydra; the exit code."""
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on instead of printing them
        import hydra

        from loralab.config.compose import data_root, register_resolvers

        register_resolvers()
        sys.argv = ["loralab", *quoted(forced(arguments))]
        conf = str(data_root() / "conf")
        try:
            hydra.main(version_base="1.3", config_path=conf, config_name="train")(self.job)()
        except Interrupted as stopped:
            raise self._resumable(stopped) from stopped
        if self.refused is not None:
            raise self.refused
        failed = [int(record.get("exit_code") or 0) for record in self.records]
        return next((code for code in failed if code), 0)

    @property
    def runner(self) -> Any:
        """One for all trials: it keeps the base."""
        if self._runner is None:
            from loralab.running.runner import Runner

            self._runner = Runner(progress=not self.many and sys.stderr.isatty())
        return self._runner

    def job(self, config: Any) -> float | None:
        """One trial; its metric goes back to the sweeper."""
        from hydra.core.hydra_config import HydraConfig

        try:
            output = Path(HydraConfig.get().runtime.output_dir).resolve()
            job = self.planned.get(output) or Job.running(config, self.many)
            job.memory_budget = self.memory_budget
            self.folder = self.folder if self.planned else job.folder.parent if self.many else job.folder
            done = self._record(job)
        except Exception as error:  # of a single run; Hydra would print its own lines about it
            self.refused = error
            return None
        self.records.append(done)
        return job.value(done)

    def work(self, packs: Sequence[Sequence[Job]]) -> None:
        """Runs packs that another process has planned."""
        for pack in packs:
            if len(pack) > 1:
                self.packs.update({job.trial: list(pack) for job in pack})
            for job in pack:
                self._record(job)

    def _record(self, job: Job) -> dict[str, Any]:
        if job.trial in self.done:
            return self.done.pop(job.trial)
        self._forget(job)
        if job.trial in self.packs:
            self._run_pack(self.packs[job.trial])
        if job.trial in self.ahead:
            done, seconds = self.ahead.pop(job.trial)
            job.say(done, seconds)
            return done
        stored = None if self.fresh else job.finished()
        if stored is None and not self.fresh:
            self._retire([job])
        if stored is None and job.trial in self.too_large:
            return job.refuse(self.too_large[job.trial])
        if stored is None:
            return job.execute(lambda: self.runner)
        job.say(stored, skipped=True)
        return stored

    def begin(self, folder: Path, jobs: Sequence[Job]) -> None:
        """Takes over the trials of a sweep, each named once: what is outdated among their records is set aside."""
        self.folder = folder
        self.planned = {job.folder.resolve(): job for job in jobs}
        if self.fresh:
            return
        self._retire(jobs)
        _say_of_earlier_versions(self.folder, [job for job in jobs if job.finished() is None])

    def _retire(self, jobs: Sequence[Job]) -> None:
        """One line for each thing that has changed."""
        stale: dict[str, list[Job]] = {}
        for job in jobs:
            if why := job.outdated():
                stale.setdefault(why, []).append(job)
        for why, found in stale.items():
            for job in found:
                job.retire()
            text = "%s %s stale and %s again, %s: %s"
            words = ("is", "runs", "its record stays") if len(found) == 1 else ("are", "run", "their records stay")
            log.info(
                text,
                *(", ".join(job.trial for job in found), *words[:2]),
                *(f"{words[2]} as {staleness.KEPT[record.RESULT]}", why),
            )

    def skip(self, job: Job) -> dict[str, Any] | None:
        """The record of a trial that is finished, told and counted; None where it has to run."""
        waits = self.fresh or any(job.trial in found for found in (self.done, self.ahead, self.packs))
        stored = None if waits else job.finished()
        if stored is not None:
            job.say(stored, skipped=True)
            self.records.append(stored)
        return stored

    def _forget(self, job: Job) -> None:
        """With --fresh nothing of an earlier command is taken up; what this one writes is."""
        if self.fresh and job.trial not in self.begun:
            from loralab.training import checkpoint

            checkpoint.forget(job.folder)
            job.spare()
        self.begun.add(job.trial)

    def prepare(
        self,
        token_budget: int | None = None,
        memory_budget: float | None = None,
        finished: Callable[[], None] = lambda: None,
    ) -> list[Pack]:
        """Decides which trials of a sweep run together. Called by the launcher after ``begin``, before the first runs.

        Where there are several GPUs they run now, and ``finished`` is called after each.
        """
        self.memory_budget = memory_budget
        waiting = {job.trial: job for job in self.planned.values() if self.fresh or job.finished() is None}
        if len(waiting) < 2 and memory_budget is None:
            return []
        from loralab.scheduling.members import Members, refusal, room

        members: list[Member] = []
        device, make = "cpu", Members().member
        for job in waiting.values():
            job.memory_budget = memory_budget
            try:
                spec = job.spec()
                device = spec.trainer.device
                members.append(make(spec, self.runner.encoded(spec)))
            except LoralabError:  # told when its turn comes
                continue
            if memory_budget is not None and (refused := refusal(members[-1], device, memory_budget)):
                self.too_large[members.pop().trial] = refused
        packs = plan(members, token_budget or TOKEN_BUDGET[device], room(device, memory_budget))
        for pack in packs:
            if len(pack.trials) > 1:
                together = [waiting[trial] for trial in pack.trials]
                self.packs.update(dict.fromkeys(pack.trials, together))
        self._foresee(packs, waiting)
        for why, count in Counter(pack.why for pack in packs if pack.why).items():
            log.info("%d of %d trials run alone: %s", count, len(waiting), why)
        names = workers.devices(device)
        if names and len(packs) > 1:
            self._spread(packs, {one.trial: one.tokens for one in members}, waiting, names, finished)
        return packs

    def _spread(
        self,
        packs: Sequence[Pack],
        tokens: dict[str, int],
        waiting: dict[str, Job],
        names: Sequence[str],
        finished: Callable[[], None],
    ) -> None:
        """Over a process for each GPU; what they leave undone runs in this one."""

        def tell(job: Job, done: dict[str, Any]) -> None:
            self.done[job.trial] = done
            self.packs.pop(job.trial, None)
            job.say(done, done["time"]["wall_s"])
            finished()

        jobs = [[waiting[trial] for trial in pack.trials] for pack in packs]
        weights = [sum(tokens[one.trial] * one.spec().trainer.max_steps for one in pack) for pack in jobs]
        shares = spread(weights, len(names))
        workers.run([[jobs[i] for i in share] for share in shares], names, self.fresh, tell)
        undone = {job.trial: job for job in waiting.values() if job.trial not in self.done}
        self.packs = {trial: [job for job in pack if job.trial in undone] for trial, pack in self.packs.items()}

    def _foresee(self, packs: Sequence[Pack], waiting: dict[str, Job]) -> None:
        """Arithmetic over all packs, and a trace of the one that seems to need most."""
        specs = [[waiting[trial].spec() for trial in pack.trials] for pack in packs]
        if not specs or not specs[0][0].plan.record:
            return
        from loralab.planning.foresee import sentence
        from loralab.planning.plan import estimate

        device = specs[0][0].trainer.device
        try:
            largest = max(specs, key=lambda pack: estimate(pack, device))
            plan = self.runner.foresight.plan(largest, [self.runner.encoded(one) for one in largest], device)
        except LoralabError:  # one of them cannot run: told when its turn comes
            return
        if plan is not None:
            log.info("%s", sentence(len(largest), plan))

    def _run_pack(self, jobs: list[Job]) -> None:
        """Trials together; what fails for all of them before the first step runs in halves (memory) or one by one."""
        for job in jobs:
            self._forget(job)
            self.packs.pop(job.trial, None)
        if len(jobs) == 1:
            return
        log.info("%d trials in one pass: %s", len(jobs), ", ".join(job.trial for job in jobs))
        begun = time.monotonic()
        with ExitStack() as stack:
            specs = [job.open(stack) for job in jobs]
            done = self.runner.run(specs)
        undone = [job for job, one in zip(jobs, done, strict=True) if _undone(one)]
        seconds = (time.monotonic() - begun) / len(jobs)
        for job, one in zip(jobs, done, strict=True):
            if job not in undone:
                self.ahead[job.trial] = (one, seconds)
        if not undone:
            return
        why = next(one for one in done if _undone(one))
        log.warning("%d trials do not run together: %s", len(undone), why["error"])
        if why["status"] == "out_of_memory":
            named = {job.trial: job for job in undone}
            for half in halves(named):
                self._run_pack([named[trial] for trial in half])

    def _resumable(self, stopped: Interrupted) -> Interrupted:
        """What is left to do and how, for a sweep that was stopped."""
        if self.many and self.folder is not None:
            left = sum(trial.get("status") != "completed" for trial in record.read_sweep(self.folder)["trials"])
            again = f"loralab sweep --resume {shlex.quote(str(self.folder))}"
            stopped.args = (f"{stopped}; {left} trials are left: {again}",)
        return stopped


def _say_of_earlier_versions(folder: Path, waiting: Sequence[Job]) -> None:
    old = sum(_schema(place) < record.SCHEMA for place in record.find(folder)) if waiting else 0
    if old:
        text = (
            "%d trials in %s are of an earlier version of loralab, which named them otherwise: %d run anew, and their"
        )
        log.info(f"{text} records stay where they are", old, folder, len(waiting))


def _schema(folder: Path) -> int:
    try:
        return int(record.read(folder)["schema"])
    except ArtifactError:
        return record.SCHEMA


def _undone(done: dict[str, Any]) -> bool:
    """Whether what befell the pack says nothing of this trial; memory that one alone has not is its own verdict."""
    return bool(done["status"] == "failed" or (done["status"] == "out_of_memory" and done["pack"]["size"] > 1))

"""What Hydra calls for each configuration: a trial that is finished is skipped, one of a pack runs with its pack."""

import logging
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loralab import record
from loralab.errors import Interrupted, LoralabError
from loralab.jobs import Job
from loralab.packing.plan import TOKEN_BUDGET, Member, Pack, halves, plan
from loralab.words import quoted

if TYPE_CHECKING:
    from loralab.specs import TrialSpec

log = logging.getLogger(__name__)


@dataclass
class Jobs:
    """The trials of one command line, and what came of them."""

    fresh: bool
    many: bool
    folder: Path | None = None
    records: list[dict[str, Any]] = field(default_factory=list)
    refused: LoralabError | None = None
    packs: dict[str, list[Job]] = field(default_factory=dict)  # trial -> the jobs it runs with
    ahead: dict[str, tuple[dict[str, Any], float]] = field(default_factory=dict)  # ran before their turn
    _runner: Any = None

    def run(self, arguments: list[str]) -> int:
        """Hands over to Hydra; the exit code."""
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on instead of printing them
        import hydra

        from loralab.config import data_root, register_resolvers

        register_resolvers()
        sys.argv = ["loralab", *quoted(arguments)]
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
            from loralab.run import Runner

            self._runner = Runner(progress=not self.many and sys.stderr.isatty())
        return self._runner

    def job(self, config: Any) -> float | None:
        """One trial; its metric goes back to the sweeper."""
        job = Job.of(config, self.many)
        self.folder = job.folder.parent if self.many else job.folder
        try:
            done = self._record(job)
        except LoralabError as error:  # of a single run; Hydra would print its own lines about it
            self.refused = error
            return None
        self.records.append(done)
        return job.value(done)

    def _record(self, job: Job) -> dict[str, Any]:
        if job.trial in self.packs:
            self._run_pack(self.packs[job.trial])
        if job.trial in self.ahead:
            done, seconds = self.ahead.pop(job.trial)
            job.say(done, seconds)
            return done
        stored = None if self.fresh else job.finished()
        if stored is None:
            return job.execute(self.runner)
        job.say(stored, skipped=True)
        return stored

    def prepare(self, jobs: Sequence[Job], token_budget: int | None) -> list[Pack]:
        """Decides which trials of a sweep run together. Called by the launcher, before the first of them."""
        waiting = {job.trial: job for job in jobs if self.fresh or job.finished() is None}
        if len(waiting) < 2:
            return []
        members: list[Member] = []
        budget = token_budget
        for job in waiting.values():
            try:
                spec = job.spec()
                budget = budget or TOKEN_BUDGET[spec.trainer.device]
                members.append(member(spec, self.runner.encoded(spec)))
            except LoralabError:  # told when its turn comes
                continue
        packs = plan(members, budget or TOKEN_BUDGET["cpu"])
        for pack in packs:
            if len(pack.trials) > 1:
                together = [waiting[trial] for trial in pack.trials]
                self.packs.update(dict.fromkeys(pack.trials, together))
        self._foresee(packs, waiting)
        for why, count in Counter(pack.why for pack in packs if pack.why).items():
            log.info("%d of %d trials run alone: %s", count, len(waiting), why)
        return packs

    def _foresee(self, packs: Sequence[Pack], waiting: dict[str, Job]) -> None:
        """Arithmetic over all packs, and a trace of the one that seems to need most."""
        specs = [[waiting[trial].spec() for trial in pack.trials] for pack in packs]
        if not specs or not specs[0][0].plan.record:
            return
        from loralab.planning.foresee import sentence
        from loralab.planning.plan import estimate

        device = specs[0][0].trainer.device
        largest = max(specs, key=lambda pack: estimate(pack, device))
        plan = self.runner.foresight.plan(largest, [self.runner.encoded(one) for one in largest], device)
        if plan is not None:
            log.info("%s", sentence(len(largest), plan))

    def _run_pack(self, jobs: list[Job]) -> None:
        """Trials together; what fails for all of them runs again in halves (memory) or one by one."""
        for job in jobs:
            self.packs.pop(job.trial, None)
        if len(jobs) == 1:
            return
        log.info("%d trials in one pass: %s", len(jobs), ", ".join(job.trial for job in jobs))
        begun = time.monotonic()
        with ExitStack() as stack:
            specs = [job.open(stack) for job in jobs]
            done = self.runner.run(specs)
        undone = [job for job, one in zip(jobs, done, strict=True) if one["status"] in ("failed", "out_of_memory")]
        seconds = (time.monotonic() - begun) / len(jobs)
        for job, one in zip(jobs, done, strict=True):
            if job not in undone:
                self.ahead[job.trial] = (one, seconds)
        if not undone:
            return
        why = next(one for one in done if one["status"] in ("failed", "out_of_memory"))
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


def member(spec: "TrialSpec", data: Any) -> Member:
    """A trial as the packer sees it; its passes hold ``batch_size`` rows of the data's mean length."""
    train = data.tokens["train"]
    length = train["tokens"] / max(1, train["rows"])
    # ending together: a record is written when its pack ends
    shares = (*spec.shares, spec.trainer.max_steps, spec.trainer.test, spec.data.generate_rows > 0)
    return Member(spec.id, shares, round(spec.data.batch_size * length), _alone(spec))


def _alone(spec: "TrialSpec") -> str:
    if not spec.adapter.packable:
        return f"adapter={spec.adapter.method} cannot share a pass"
    if not spec.quantization.packable:
        return f"quantization={spec.quantization.name} looks at the whole batch"
    if spec.memory.alone:
        return spec.memory.alone
    dropout = spec.model.own_dropout()
    if dropout:
        return f"the base's own dropout ({dropout:g}) cannot be drawn for each trial; model.dropout=0 switches it off"
    unaware = [name for name, made in spec.callbacks.items() if not getattr(made(), "pack_aware", False)]
    return f"callbacks.{unaware[0]} is not marked pack_aware" if unaware else ""

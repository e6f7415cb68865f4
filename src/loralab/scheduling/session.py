"""One call of ``train``: hands the command line to Hydra, runs its trials, returns the exit code."""

import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loralab.config.sweep_files import refuse_mode
from loralab.config.words import forced, quoted
from loralab.errors import ConfigError, DataError, Interrupted
from loralab.quick_imports import quick_imports
from loralab.records import record
from loralab.records.lock import hold
from loralab.records.metric_logger import prepare
from loralab.scheduling import ranks
from loralab.scheduling.job import Job, Record
from loralab.scheduling.sweep import PackOptions, Sweep, finished, set_stale_aside
from loralab.scheduling.sweep_file import check_begun, mark, status_of

if TYPE_CHECKING:
    from loralab.running.runner import Runner
    from loralab.scheduling.previewing import Preview
    from loralab.scheduling.rerun import Rerun
    from loralab.training.specs import TrialSpec

log = logging.getLogger(__name__)


@dataclass
class Session:
    """Its ``job`` is Hydra's task function. ``folder``: of the run or the sweep; None until it is known."""

    fresh: bool
    many: bool
    flags: list[str] = field(default_factory=list)  # of Hydra's own, with which a resumed sweep is called again
    resumes: bool = False  # a begun sweep, whose trials it finishes
    folder: Path | None = None
    latest: dict[str, Record] = field(default_factory=dict)  # of each trial, in the order of their first rounds
    error: Exception | None = None
    failed: bool = False  # runs again what has failed, and nothing else
    previews: bool = False  # shows what a sweep would run, and runs nothing
    previewed: "Preview | None" = None
    again: "Rerun | None" = None  # the record whose trial this run makes once more
    listing: bool = False  # sweep.json is written by the process that launches trials, not by those that run one
    process: int = field(default_factory=os.getpid)
    jobs: dict[tuple[str, ...], Job] = field(default_factory=dict)  # by their overrides
    finished: dict[str, str] | None = None  # of launch.jobs_of; None: not looked for yet
    about: Mapping[str, Any] = field(default_factory=dict)  # what sweep.json says of a search
    begun: set[str] = field(default_factory=set)  # trials of earlier rounds, which go on from there
    _overrides: list[str] = field(default_factory=list)  # the words that are not Hydra's own
    _searched: list[str] = field(default_factory=list)  # those that name folders to search
    _runner: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """For a process that a launcher starts: without what is loaded here."""
        return {**self.__dict__, "_runner": None, "latest": {}, "jobs": {}, "finished": None, "about": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        from loralab.config.compose import register_resolvers

        self.__dict__.update(state)
        register_resolvers()

    def run(self, arguments: list[str]) -> int:
        """The exit code of the first trial that failed, else 0. Raises the error of a single run."""
        os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise its errors instead of printing them
        import hydra

        from loralab.config.compose import register_resolvers
        from loralab.config.places import data_root, searched

        register_resolvers()
        config_dir, arguments = _without_config_dir(arguments)
        self._overrides = [word for word in arguments if not word.startswith(("-", "hydra"))]
        self._searched = [word for word in arguments if word.startswith("hydra.searchpath=")]
        sys.argv = ["loralab", *quoted(forced(arguments))]
        conf = str(data_root() / "conf")
        try:
            with searched(config_dir), _composed_once(arguments, config_dir):
                hydra.main(version_base="1.3", config_path=conf, config_name="train")(self.job)()
        except Interrupted as stopped:
            raise self._with_how_to_resume(stopped) from stopped
        if self.error is not None:
            raise self.error
        codes = [int(stored.get("exit_code") or 0) for stored in self.records]
        return next((code for code in codes if code), 0)

    @property
    def records(self) -> list[Record]:
        """Of each trial the latest. Equal parts of them are one object, which nobody may change."""
        return list(self.latest.values())

    def runner(self) -> "Runner":
        """The same Runner for all trials, which keeps the base loaded."""
        if self._runner is None:
            with quick_imports():
                from loralab.running.runner import Runner

            self._runner = Runner(progress=not self.many and sys.stderr.isatty())
        return self._runner  # type: ignore[no-any-return]

    def job(self, config: Any) -> float | None:
        """Hydra's task: runs ``config`` and returns its metric to the sweeper; None where there is none."""
        try:
            job = Job.running(config)
            job.flags, job.fresh = [*self.flags, *self._searched], self._is_fresh(job)
            if self.again is not None:
                job = self.again.job(job)
            refuse_mode(job.choices.items(), self.many)
            stored = self._run_in_sweep(job, config) if self.many else self._run_single(job)
            if self.again is not None:
                self.again.tell(job.folder)
        except Exception as error:  # Hydra would print its own lines about it
            if os.getpid() != self.process:
                raise
            self.error = error
            if not self.many:
                _remove_if_empty()
            return None
        self.latest[stored["trial"]] = stored
        return job.value(stored)

    def sweep(
        self,
        folder: Path,
        jobs: list[Job],
        header: dict[str, Any],
        options: PackOptions,
        launch: Callable[[list[Job]], None] | None = None,
    ) -> dict[str, Record]:
        """{trial: record} of ``jobs``, each trial once. The caller holds ``folder``.

        ``launch``: has trials that are not finished run by another launcher, whose processes call ``job``.
        """
        refuse_mode(dict.fromkeys(pair for job in jobs for pair in job.choices.items()), self.many)
        before = dict(self.latest)
        if self.resumes and not before and "search" not in self.about:  # a search asks for further trials
            check_begun(folder, jobs)
        for job in jobs:
            job.flags, job.fresh = [*self.flags, *self._searched], self._is_fresh(job)
        self.jobs |= {tuple(job.overrides): job for job in jobs}
        self.folder, self.listing = folder, launch is not None
        failed = self.failed and not header.get("halving")
        if self.failed and not failed and not before:
            log.info(
                "sweep.halving compares all trials at a rung: those that are not finished run with the failed ones"
            )
        sweep = Sweep(folder, jobs, self.runner, failed, before)
        records = sweep.run({**header, **self.about, "flags": self.flags}, options, launch)
        self.latest |= {job.trial: records[job.trial] for job in jobs}
        self.begun |= records.keys()
        return records

    def _is_fresh(self, job: Job) -> bool:
        return self.fresh and job.trial not in self.begun

    def status(self, words: Sequence[str]) -> str:
        """Of the trial with these overrides, one of this sweep's; empty where it has none."""
        job = self.jobs.get(tuple(words))
        return str(self.latest[job.trial]["status"]) if job is not None and job.trial in self.latest else ""

    def is_complete(self, words: Sequence[str]) -> bool:
        """Whether the trial with these overrides is completed."""
        return self.status(words) == "completed"

    def end_early(self, ended: Mapping[tuple[str, ...], str]) -> None:
        """Marks the paused trials with these overrides as ended by the sweep; ``ended``: why, for each."""
        statuses = {}
        for words, why in ended.items():
            job = self.jobs.get(words)
            if job is None:  # the same trial as one with other words, which is marked
                continue
            self.latest[job.trial] = stored = job.end_early(why)
            log.info("%s ends: %s", job.trial, why, extra={"trial": job.trial})
            statuses[job.trial] = stored["status"]
        if statuses:
            assert self.folder is not None
            mark(self.folder, statuses)

    def _run_in_sweep(self, job: Job, config: Any) -> Record:
        """A trial of a sweep whose launcher is not loralab's."""
        if self.listing:
            return self._run_alone(job)
        if os.getpid() != self.process:
            raise ConfigError(
                "only hydra/sweeper=loralab, the default, has trials run in other processes; valid: that one, or"
                " hydra/launcher=packed"
            )
        from hydra.core.hydra_config import HydraConfig

        from loralab.scheduling.launch import header

        self.folder = job.folder.parent
        with hold(self.folder):
            sweep = Sweep(self.folder, [job], self.runner)
            sweep_header = header(config, HydraConfig.get(), self.folder)
            sweep_header |= {"overrides": self._overrides, "flags": self.flags}
            return sweep.run(sweep_header, PackOptions(pack=False))[job.trial]

    def _run_alone(self, job: Job) -> Record:
        """A trial that another process lists in sweep.json, where that is not this one."""
        from loralab.scheduling.launch import show_own_lines

        show_own_lines()
        sweep = Sweep(job.folder.parent, [], self.runner)
        sweep.run_packs([[job]])
        stored = sweep.records[job.trial]
        text = "trial %s: %s %s, in process %d"
        log.info(text, job.trial, stored["status"], _score(job, stored), os.getpid(), extra={"terminal": False})
        return stored

    def _run_single(self, job: Job) -> Record:
        self.folder = job.folder
        stored = None if self.fresh else finished(job, self.runner)
        if stored is not None:
            log.info("%s  finished before; --fresh runs it again\n%s", _score(job, stored), job.folder)
            return stored
        if self.fresh:
            job.begin_anew()
        else:
            set_stale_aside([job])
        begun = time.monotonic()
        self._check_rows(job)
        with ExitStack() as stack:
            spec = job.open(stack)
            log.info("trial %s in %s", spec.id, job.folder)
            stored = self._train(job, spec)
        if stored["error"]:
            log.error("loralab: %s", stored["error"])
        else:
            from loralab.training.progress import clock

            metric = job.content.get("metric")
            others = "  ".join(f"{name} {value:.4f}" for name, value in stored["metrics"].items() if name != metric)
            log.info("%s  %s  (%s)\n%s", _score(job, stored), others, clock(time.monotonic() - begun), job.folder)
        return stored

    def _train(self, job: Job, spec: "TrialSpec") -> Record:
        if spec.trainer.processes > 1:
            return ranks.run(job, spec, progress=sys.stderr.isatty())
        if spec.trainer.strategy:
            log.info("one process trains it, for trainer.devices names no more and there are no more GPUs")
        (stored,) = self.runner().run([spec])
        return stored

    def _check_rows(self, job: Job) -> None:
        """Reads the rows before any weight; the runner keeps them. Raises DataError, ConfigError."""
        spec = job.spec()
        prepare(spec.logger)
        if spec.data.reads_base:
            return
        try:
            self.runner().inputs.rows(spec)
        except (DataError, ConfigError):
            raise
        except Exception:  # the run itself will report it
            log.debug("the rows of %s cannot be read", spec.id, exc_info=True)

    def _with_how_to_resume(self, stopped: Interrupted) -> Interrupted:
        """Adds to the message what is left and the command that goes on with it."""
        if self.folder is None:
            return stopped
        if self.many:
            trials = record.read_sweep(self.folder)["trials"]
            left = sum(trial.get("status") not in ("completed", "pruned") for trial in trials)
            command = f"loralab sweep --resume {shlex.quote(str(self.folder))}"
            stopped.args = (f"{stopped}; {left} trials are left: {command}",)
        elif status_of(self.folder) == "interrupted":
            from loralab.training import checkpoint

            command = record.rerun(record.read(self.folder), [f"hydra.run.dir={self.folder}"])
            way = "goes on from its checkpoint" if checkpoint.path(self.folder).is_file() else "begins anew"
            stopped.args = (f"{stopped}; it {way} with: {command}",)
        return stopped


def _remove_if_empty() -> None:
    """Removes the run folder that Hydra has made, where nothing was written into it, and runs/ above it where that is
    empty too."""
    from hydra.core.hydra_config import HydraConfig

    runtime = HydraConfig.get().runtime
    folder, runs = Path(runtime.output_dir), Path(runtime.cwd) / "runs"
    with suppress(OSError):
        folder.rmdir()
        for parent in folder.parents:
            if parent.is_relative_to(runs):
                parent.rmdir()


def _without_config_dir(arguments: list[str]) -> tuple[str | None, list[str]]:
    """(the folder of ``--config-dir``, the other words): Hydra would search it behind loralab's folder."""
    flag, folder, others = "--config-dir", None, list(arguments)
    while flag in others:
        place = others.index(flag)
        folder = others[place + 1]
        del others[place : place + 2]
    return folder, others


def _score(job: Job, stored: Record) -> str:
    value = job.value(stored)
    return f"{job.content.get('metric')} {value:.4f}" if value is not None else ""


@contextmanager
def _composed_once(arguments: list[str], config_dir: str | None) -> Iterator[None]:
    """Keeps Hydra from composing everything once more to see ``hydra.mode``, where nothing can have set it.

    No yaml of loralab's sets it: only a word can, or a yaml of the user's.
    """
    users = ("hydra.mode", "hydra.searchpath", "--config-name")
    if config_dir or any(name in word for word in arguments for name in users):
        yield
        return
    from hydra._internal.hydra import Hydra

    original = Hydra.get_mode
    Hydra.get_mode = lambda *_, **__: None
    try:
        yield
    finally:
        Hydra.get_mode = original

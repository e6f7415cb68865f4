"""One trial as the command line runs it: where it lies, whether it is finished, what is said of it."""

import hashlib
import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from loralab import record
from loralab.config import plain, trial_id, trial_spec
from loralab.errors import ArtifactError, ConfigError, LoralabError
from loralab.locks import hold

if TYPE_CHECKING:
    from loralab.specs import TrialSpec

log = logging.getLogger(__name__)


@dataclass
class Job:
    """A composed configuration and its run folder."""

    config: DictConfig
    folder: Path
    overrides: list[str]
    choices: dict[str, str]
    number: int
    many: bool
    memory_budget: float | None = None  # GiB, of the launcher

    @classmethod
    def of(cls, config: DictConfig, many: bool) -> "Job":
        """The job Hydra is running now."""
        return cls.composed(config, HydraConfig.get(), Path(HydraConfig.get().runtime.output_dir), many)

    @classmethod
    def composed(cls, config: DictConfig, hydra: Any, folder: Path, many: bool = True) -> "Job":
        """A job that may run later; ``hydra``: Hydra's own part of its configuration."""
        if hydra.job.chdir:
            raise ConfigError("hydra.job.chdir=true would move every relative path; valid: false")
        choices = {str(k): str(v) for k, v in hydra.runtime.choices.items() if not str(k).startswith("hydra/")}
        number = int(hydra.job.num) if many else 0
        return cls(config, folder, list(hydra.overrides.task), choices, number, many)

    def stored(self) -> dict[str, Any]:
        """As JSON, for another process."""
        own = {"overrides": self.overrides, "choices": self.choices, "number": self.number}
        return {**own, "config": plain(self.config), "folder": str(self.folder), "memory_budget": self.memory_budget}

    @classmethod
    def restored(cls, stored: dict[str, Any]) -> "Job":
        """From ``stored``; a trial of a sweep."""
        given = {**stored, "config": OmegaConf.create(stored["config"]), "folder": Path(stored["folder"])}
        return cls(**given, many=True)

    def finished(self) -> dict[str, Any] | None:
        """The record of an earlier, completed run of the very same trial on the same files.

        Raises ArtifactError where a single run would overwrite another trial's result.
        """
        try:
            stored = record.read(self.folder)
        except ArtifactError:
            return None
        if stored["status"] != "completed":
            return None
        if stored["trial"] != self.trial:
            raise ArtifactError(
                f"{self.folder} holds the completed trial {stored['trial']} of other settings; valid: another"
                " hydra.run.dir, or --fresh to overwrite it"
            )
        if stored["data"].get("source") != self.source():
            log.info("the data files have changed since this trial ran: it runs again")
            return None
        return stored

    def source(self) -> str | None:
        """16 hex digits of the bytes of the data files that the configuration names; null where it names none."""
        named = (self.config.data.get(key) for key in ("train", "validation", "test"))
        paths = [Path(str(name)).expanduser() for name in named if name]
        digest = hashlib.sha256()
        for path in paths:
            if path.is_file():
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16] if paths else None

    @cached_property
    def trial(self) -> str:
        return trial_id(self.config)

    def spec(self) -> "TrialSpec":
        """Built and checked. Raises ConfigError."""
        spec = trial_spec(self.config, self.folder, self.overrides, self.choices)
        if self.memory_budget is None:
            return spec
        budget = min(self.memory_budget, spec.plan.budget_gib or self.memory_budget)
        return replace(spec, plan=replace(spec.plan, budget_gib=budget))

    def execute(self, runner: Any) -> dict[str, Any]:
        """Runs the trial alone. In a sweep a failure is in the record; a single run raises what is wrong with it."""
        started = time.monotonic()
        try:
            self.spec()
        except LoralabError as error:
            if not self.many:
                raise
            return self.refuse(error)
        with ExitStack() as stack:
            spec = self.open(stack)
            if not self.many:
                log.info("trial %s in %s: loading the base model", spec.id, self.folder)
            done: dict[str, Any] = runner.run([spec])[0]
        self.say(done, seconds=time.monotonic() - started)
        return done

    def open(self, stack: ExitStack) -> "TrialSpec":
        """The run folder, held until ``stack`` closes, with the configuration in it."""
        stack.enter_context(hold(self.folder))
        (self.folder / "config.yaml").write_text(OmegaConf.to_yaml(self.config, resolve=True))
        if self.many:
            logging.getLogger("loralab.telemetry.progress").setLevel(logging.WARNING)
        return replace(self.spec(), source=self.source())

    def refuse(self, error: LoralabError) -> dict[str, Any]:
        """The record of a trial that is not run."""
        content = plain(self.config)
        entry = record.blank(
            self.trial,
            config=content,
            overrides=self.overrides,
            choices=self.choices,
            seed=seed if isinstance(seed := content.get("seed"), int) else None,
        )
        entry.update(status=error.status, error=str(error), exit_code=error.exit_code)
        record.write(self.folder, entry)
        self.say(entry)
        return entry

    def value(self, done: dict[str, Any]) -> float | None:
        """The trial's metric, what a sweeper optimizes."""
        value = done["metrics"].get(self.config.metric)
        return None if value is None else float(value)

    def say(self, done: dict[str, Any], seconds: float | None = None, skipped: bool = False) -> None:
        """The one line a trial is worth in a sweep; a few more when it runs alone."""
        from loralab.telemetry.progress import clock  # it imports Lightning, for which a wrong word shall not wait

        metric = str(self.config.metric)
        value = self.value(done)
        scored = f"{metric} {value:.4f}" if value is not None else ""
        if not self.many:
            if done["error"]:
                log.error("loralab: %s", done["error"])
            elif skipped:
                log.info("%s  finished before; --fresh runs it again\n%s", scored, self.folder)
            else:
                others = "  ".join(f"{name} {v:.4f}" for name, v in done["metrics"].items() if name != metric)
                log.info("%s  %s  (%s)\n%s", scored, others, clock(seconds or 0.0), self.folder)
            return
        state = "finished before" if skipped else (clock(seconds) if seconds is not None else "")
        if done["error"]:
            state = f"{done['status']}: {done['error']}"
        log.info("[%s] %s  %s  %s", self._place(), self._label(), scored, state)

    def _place(self) -> str:
        try:
            total = sum(not one.get("earlier") for one in record.read_sweep(self.folder.parent)["trials"])
        except ArtifactError:
            return str(self.number + 1)
        return f"{self.number + 1:>{len(str(total))}}/{total}"

    def _label(self) -> str:
        try:
            axes = record.read_sweep(self.folder.parent)["axes"]
        except ArtifactError:
            axes = {}
        shown = [o.lstrip("+") for o in self.overrides if o.lstrip("+").split("=")[0] in axes]
        return "  ".join(shown or self.overrides)

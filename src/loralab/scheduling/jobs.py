"""One trial as the command line runs it: where it lies, whether it is finished, what is said of it."""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from loralab.config import staleness
from loralab.config.build import trial_id, trial_spec
from loralab.config.compose import plain
from loralab.errors import ArtifactError, ConfigError, DataError, LoralabError
from loralab.records import record
from loralab.records.lock import hold

if TYPE_CHECKING:
    from loralab.training.specs import TrialSpec

log = logging.getLogger(__name__)


@dataclass
class Job:
    """A composed configuration, plain and resolved, and its run folder."""

    content: dict[str, Any]
    folder: Path
    overrides: list[str]
    choices: dict[str, str]
    number: int
    many: bool
    memory_budget: float | None = None  # GiB, of the launcher
    sweep: Mapping[str, Any] | None = None  # what sweep.json says of the sweep; null: it is read

    @classmethod
    def running(cls, config: DictConfig, many: bool) -> "Job":
        """The job Hydra is running now."""
        hydra = HydraConfig.get()
        return cls.of(plain(config, hydra.overrides.task), hydra, Path(hydra.runtime.output_dir), many)

    @classmethod
    def of(cls, content: dict[str, Any], hydra: Any, folder: Path, many: bool = True) -> "Job":
        """A job that may run later; ``hydra``: Hydra's own part of its configuration."""
        if hydra.job.chdir:
            raise ConfigError("hydra.job.chdir=true would move every relative path; valid: false")
        choices = {str(k): str(v) for k, v in hydra.runtime.choices.items() if not str(k).startswith("hydra/")}
        number = int(hydra.job.num) if many else 0
        return cls(content, folder, list(hydra.overrides.task), choices, number, many)

    def stored(self) -> dict[str, Any]:
        """As JSON, for another process."""
        own = {"overrides": self.overrides, "choices": self.choices, "number": self.number}
        return {**own, "content": self.content, "folder": str(self.folder), "memory_budget": self.memory_budget}

    @classmethod
    def restored(cls, stored: dict[str, Any]) -> "Job":
        """From ``stored``; a trial of a sweep."""
        return cls(**{**stored, "folder": Path(stored["folder"])}, many=True)

    def finished(self) -> dict[str, Any] | None:
        """The record of an earlier, completed run of the very same trial on the same base and data.

        Raises ArtifactError where this run would overwrite another trial's result.
        """
        stored, why = self._standing
        return None if why else stored

    def outdated(self) -> str:
        """Why a record that is complete does not finish this trial any more; empty where that is not so."""
        return self._standing[1]

    @cached_property
    def _standing(self) -> tuple[dict[str, Any] | None, str]:
        """The completed record in the folder, and what has changed since."""
        if not (self.folder / record.RESULT).exists():
            return None, ""
        try:
            stored = record.read(self.folder)
        except ArtifactError as error:  # of a later version of loralab, or damaged: it is somebody's all the same
            return None, str(error)
        if stored["status"] != "completed":
            return None, ""
        if stored["trial"] != self.trial:
            whose = "of other settings" if stored["schema"] == record.SCHEMA else "of an earlier version of loralab"
            raise ArtifactError(
                f"{self.folder} holds the completed trial {stored['trial']} {whose}; valid: another"
                " hydra.run.dir, or --fresh to overwrite it"
            )
        return stored, staleness.outdated(stored, self.content)

    def retire(self) -> None:
        """Keeps what is outdated under another name."""
        staleness.set_aside(self.folder)
        self.__dict__.pop("_standing", None)

    def spare(self) -> None:
        """Keeps a record that cannot be read, of a later version or damaged, where --fresh overwrites others."""
        try:
            record.read(self.folder)
        except ArtifactError:
            self.retire()

    @cached_property
    def trial(self) -> str:
        return trial_id(self.content)

    @cached_property
    def _spec(self) -> "TrialSpec":
        return trial_spec(self.content, self.folder, self.overrides, self.choices)

    def spec(self) -> "TrialSpec":
        """Built and checked. Raises ConfigError."""
        spec = self._spec
        if self.memory_budget is None:
            return spec
        budget = min(self.memory_budget, spec.plan.budget_gib or self.memory_budget)
        return replace(spec, plan=replace(spec.plan, budget_gib=budget))

    def execute(self, make_runner: Callable[[], Any]) -> dict[str, Any]:
        """Runs the trial alone. In a sweep a failure is in the record; a single run raises what is wrong with it.

        Settings that are refused do not wait for the import of the runner.
        """
        started = time.monotonic()
        try:
            spec = self.spec()
        except LoralabError as error:
            if not self.many:
                raise
            return self.refuse(error)
        runner = make_runner()
        if not self.many:
            _check_rows(spec, runner)
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
        self.__dict__.pop("_standing", None)
        (self.folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(self.content)))
        if self.many:
            logging.getLogger("loralab.training.progress").setLevel(logging.WARNING)
        return self.spec()

    def refuse(self, error: LoralabError) -> dict[str, Any]:
        """The record of a trial that is not run."""
        seed = self.content.get("seed")
        entry = record.blank(
            self.trial,
            config=self.content,
            overrides=self.overrides,
            choices=self.choices,
            seed=seed if isinstance(seed, int) else None,
        )
        entry.update(status=error.status, error=str(error), exit_code=error.exit_code)
        record.write(self.folder, entry)
        self.say(entry)
        return entry

    def value(self, done: dict[str, Any]) -> float | None:
        """The trial's metric, what a sweeper optimizes; None where there is no result."""
        value = done["metrics"].get(str(self.content.get("metric"))) if done["status"] == "completed" else None
        return None if value is None else float(value)

    def say(self, done: dict[str, Any], seconds: float | None = None, skipped: bool = False) -> None:
        """The one line a trial is worth in a sweep; a few more when it runs alone."""
        metric = str(self.content.get("metric"))
        value = self.value(done)
        scored = f"{metric} {value:.4f}" if value is not None else ""
        if not self.many:
            if done["error"]:
                log.error("loralab: %s", done["error"])
            elif skipped:
                log.info("%s  finished before; --fresh runs it again\n%s", scored, self.folder)
            else:
                others = "  ".join(f"{name} {v:.4f}" for name, v in done["metrics"].items() if name != metric)
                log.info("%s  %s  (%s)\n%s", scored, others, _clock(seconds or 0.0), self.folder)
            return
        state = "finished before" if skipped else (_clock(seconds) if seconds is not None else "")
        if done["error"]:
            state = f"{done['status']}: {done['error']}"
        log.info("[%s] %s  %s  %s", self._place(), self._label(), scored, state)

    def differing(self, other: "Job") -> list[str]:
        """The words in which this trial is spelled otherwise than ``other``."""
        return [word for word in self.overrides if word not in other.overrides]

    def _place(self) -> str:
        places = [one["trial"] for one in self._listed()["trials"] if not one.get("earlier")]
        place = places.index(self.trial) + 1 if self.trial in places else self.number + 1
        return f"{place:>{len(str(len(places)))}}/{len(places)}" if places else str(place)

    def _label(self) -> str:
        axes = self._listed()["axes"]
        shown = [o.lstrip("+") for o in self.overrides if o.lstrip("+").split("=")[0] in axes]
        return "  ".join(shown or self.overrides)

    def _listed(self) -> Mapping[str, Any]:
        try:
            return self.sweep or record.read_sweep(self.folder.parent)
        except ArtifactError:
            return {"trials": [], "axes": {}}


def _check_rows(spec: "TrialSpec", runner: Any) -> None:
    """Reads the rows, which ``runner`` keeps, before a weight: raises DataError, ConfigError."""
    if spec.data.from_base:
        return
    try:
        runner.encoded(spec)
    except (DataError, ConfigError):
        raise
    except Exception:  # told by the run itself
        log.debug("the rows of %s cannot be read", spec.id, exc_info=True)


def _clock(seconds: float) -> str:
    from loralab.training.progress import clock  # it imports Lightning, for which a wrong word shall not wait

    return clock(seconds)

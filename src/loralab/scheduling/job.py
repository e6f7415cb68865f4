"""One trial of a command line: its configuration, its folder, and whether it is finished."""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from loralab.config import staleness
from loralab.config.build import trial_id, trial_spec
from loralab.config.compose import as_yaml, check_one_each, plain, settled_words
from loralab.config.sweep_files import named_classes, own_files
from loralab.errors import ArtifactError, ConfigError, LoralabError
from loralab.records import record
from loralab.records.lock import hold
from loralab.records.secrets import redact
from loralab.records.shared import share
from loralab.signals import check

if TYPE_CHECKING:
    from loralab.training.specs import TrialSpec

Record = dict[str, Any]
PAUSING = "trainer.until="  # no part of what a trial is
_PASSED_ON = ("content", "overrides", "choices", "memory_budget", "flags", "fresh")


@dataclass
class Job:
    """A composed configuration (``content``: resolved, without Hydra's part) and the folder it runs in."""

    content: dict[str, Any]
    folder: Path
    overrides: list[str]
    choices: dict[str, str]
    memory_budget: float | None = None  # GiB, of the launcher
    flags: list[str] = field(default_factory=list)  # of Hydra's, with which the trial can be called again
    fresh: bool = False  # it begins anew, whatever its folder holds

    @classmethod
    def running(cls, config: DictConfig) -> "Job":
        """The job that Hydra is running now."""
        hydra = HydraConfig.get()
        return cls.of(plain(config, hydra.overrides.task), hydra, Path(hydra.runtime.output_dir))

    @classmethod
    def of(cls, content: dict[str, Any], hydra: Any, folder: Path) -> "Job":
        """A job that may run later; ``hydra``: Hydra's own part of its configuration."""
        if hydra.job.chdir:
            raise ConfigError("hydra.job.chdir=true would move every relative path; valid: false")
        check_one_each(content, hydra)
        choices = {str(k): str(v) for k, v in hydra.runtime.choices.items() if not str(k).startswith("hydra/")}
        words = [word for word in settled_words(hydra, content) if not word.lstrip("+").startswith(PAUSING)]
        named = {group: content[group] for group in named_classes(words) if group in choices}
        choices |= {group: str(node["_target_"]) for group, node in named.items() if isinstance(node, dict)}
        return cls(content, folder, words, choices)

    def as_json(self) -> dict[str, Any]:
        """For another process: the fields, nothing that is cached."""
        return {**{name: getattr(self, name) for name in _PASSED_ON}, "folder": str(self.folder)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Job":
        """What ``as_json`` gave."""
        return cls(**{**stored, "folder": Path(stored["folder"])})

    @cached_property
    def trial(self) -> str:
        """The trial's id: 10 hex digits. Raises Interrupted where a signal came that an import made an error of."""
        found = trial_id(self.content)
        check()
        return found

    @property
    def until(self) -> float | None:
        """The share of its steps at which it pauses; None: it does not."""
        until = self.content["trainer"].get("until")
        return None if until is None else float(until)

    @property
    def asked(self) -> list[str]:
        """The overrides with where it pauses, for another process."""
        return [*self.overrides, *([f"++{PAUSING}{self.until:g}"] if self.until is not None else [])]

    def finished(self) -> Record | None:
        """The record of an earlier run of the very same trial on the same base and data that was completed, or has been
        paused where this one is to pause.

        Raises ArtifactError where this run would overwrite another trial's result, ConfigError where the settings are
        not valid.
        """
        stored, why_stale = self._earlier_run
        return None if why_stale else stored

    def tidy(self) -> None:
        """Removes the checkpoints of a completed trial whose process was killed before it could."""
        if (self.folder / "checkpoints").is_dir():
            from loralab.training.checkpoint import forget

            forget(self.folder)

    def why_stale(self) -> str:
        """Why the completed record in the folder is no longer valid for this trial; empty if it is or there is none."""
        return self._earlier_run[1]

    @cached_property
    def _earlier_run(self) -> tuple[Record | None, str]:
        """(completed record in the folder, why it is stale); (None, ...) where there is none."""
        if not (self.folder / record.RESULT).exists():
            return None, ""
        try:
            stored = share(record.read(self.folder))
        except ArtifactError as error:  # of a later version of loralab, or damaged: kept under another name
            return None, str(error)
        if stored["status"] != "completed":
            paused = stored["trial"] == self.trial and self.has_paused(stored)
            return (stored, staleness.outdated(stored, self.content)) if paused else (None, "")
        if stored["trial"] != self.trial:
            self.spec()  # settings that are not valid have no trial's id: what is wrong with them comes first
            whose = "of other settings" if stored["schema"] == record.SCHEMA else "of an earlier version of loralab"
            raise ArtifactError(
                f"{self.folder} holds the completed trial {stored['trial']} {whose}; valid: another"
                " hydra.run.dir, or --fresh to overwrite it"
            )
        return stored, staleness.outdated(stored, self.content)

    def set_aside(self) -> None:
        """Renames the files of a stale run."""
        staleness.set_aside(self.folder)
        self.forget()

    def forget(self) -> None:
        """Lets go of what was read and built of it, which is read and built again where it is asked for."""
        self.__dict__.pop("_earlier_run", None)
        self.__dict__.pop("_spec", None)

    def begin_anew(self) -> None:
        """Removes the checkpoint of an earlier run; a record that cannot be read is kept under another name."""
        from loralab.training import checkpoint

        checkpoint.forget(self.folder)
        try:
            record.read(self.folder)
        except ArtifactError:
            self.set_aside()

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

    def open(self, stack: ExitStack, patience: float = 0.0) -> "TrialSpec":
        """Locks the run folder until ``stack`` closes, writes config.yaml into it and returns the trial's spec.
        ``patience``: seconds for which a process that has the folder is waited for."""
        stack.enter_context(hold(self.folder, patience))
        self.__dict__.pop("_earlier_run", None)
        (self.folder / "config.yaml").write_text(as_yaml(redact(self.content)), "utf-8")
        return self.described()

    def described(self) -> "TrialSpec":
        """The trial's spec with what its record says of how it was called."""
        return replace(self.spec(), flags=self.flags, files=own_files(self.choices))

    def refuse(self, error: LoralabError) -> Record:
        """Writes and returns the record of a trial that is not run."""
        refused = self.refusal(error)
        record.write(self.folder, refused)
        return refused

    def refusal(self, error: LoralabError) -> Record:
        """The record of a trial that is not run. It is not written: another process may hold the folder."""
        seed = self.content.get("seed")
        seed = seed if isinstance(seed, int) else None
        refused = record.blank(
            self.trial, config=self.content, overrides=self.overrides, choices=self.choices, seed=seed
        )
        refused.update(status=error.status, error=str(error), exit_code=error.exit_code, flags=self.flags)
        return refused

    def value(self, stored: Record) -> float | None:
        """The trial's metric, which a sweeper optimizes, at the step where it is to pause, if it is to.

        None where the trial has failed, nan where it has gone on without a score there."""
        name, pause = str(self.content.get("metric")), self._pause(stored) if self.until is not None else None
        if self.until is not None and (pause is not None or stored["status"] == "completed"):
            value = (pause or {}).get(name)
            return math.nan if value is None else float(value)
        value = stored["metrics"].get(name) if stored["status"] == "completed" else None
        return None if value is None else float(value)

    def has_paused(self, stored: Record) -> bool:
        """Whether a record has the pause that this trial is to make."""
        return self.until is not None and self._pause(stored) is not None

    def _pause(self, stored: Record) -> dict[str, Any] | None:
        """The scores that a record has of the pause that this trial is to make; None where it has not made it."""
        found = [one for one in stored.get("pauses") or [] if one["until"] == self.until]
        return found[-1]["metrics"] if found and self.until is not None else None

    def end_early(self, why: str) -> Record:
        """The record in the folder, marked as ended by its sweep. Its checkpoint stays: without halving it goes on."""
        stored = record.read(self.folder)
        if stored["status"] in ("interrupted", "pruned"):
            step = stored["pauses"][-1]["step"] if stored.get("pauses") else None
            stored.update(status="pruned", stopped_early={"step": step, "metric": None, "best": None, "why": why})
            record.write(self.folder, stored)
        return stored

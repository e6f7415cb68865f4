"""A trial read from its folder: its record, its status today, and the reason where it has no result."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from loralab.analysis.values import UNKNOWN, Json, identity, is_number, label, lookup
from loralab.config import staleness
from loralab.errors import ArtifactError
from loralab.records import record as records
from loralab.records.shared import section

MISSING = "missing"  # listed by the sweep, but has left no record yet
DAMAGED = "damaged"  # has a record that cannot be read
PRUNED = "pruned"  # ended early by its sweep, which compared it with others
STALE = "stale"  # completed, on a base, tokenizer or data files that have changed since
UNSCORED = "without_result"  # completed, but its metric is no finite number
IMPORTED = "imported"  # trained elsewhere, and its metric was not given

# Of a record's configuration: what must be an object, what must be one value and not a list of several.
_GROUPS = ("model", "data", "adapter", "optimizer", "trainer", "quantization", "schedule")
_SETTINGS = (
    *("metric", "metric_mode", "model.name_or_path", "model.tokenizer", "model.task", "model.max_length"),
    *("adapter.r", "adapter.lora_alpha", "optimizer.lr", "trainer.max_steps", "trainer.patience"),
)

_OWN = ("config", "metrics", "time")  # sections that no two trials have in common

Pack = tuple[Any, ...]


@dataclass(frozen=True)
class TrialResult:
    """One trial: ``values`` are its axes' labels, each of one value; ``record`` is blank where none was written;
    ``configuration`` is equal for trials that differ only by seed."""

    folder: Path
    record: Json
    status: str
    values: dict[str, str] = field(default_factory=dict)
    configuration: str = ""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def ok(self) -> bool:
        return self.status == "completed"

    @property
    def seed(self) -> str:
        return self.values.get("seed", UNKNOWN)

    @property
    def metric(self) -> str:
        """What it is ranked by."""
        return _metric(self.record)

    @property
    def mode(self) -> str:
        return str(self.record["config"].get("metric_mode") or "min")

    def get(self, dotted: str) -> Any:
        """A value of the record, such as ``base.bytes``; None where there is none."""
        return lookup(self.record, dotted)

    def setting(self, dotted: str) -> Any:
        """A value of its configuration; None where there is none."""
        return lookup(self.record["config"], dotted)

    def score(self, metric: str) -> float | None:
        """The finite number that a completed trial has for a metric."""
        return _score(self.record, metric) if self.ok else None

    @cached_property
    def pack(self) -> Pack | None:
        """Equal for trials that were trained in one pass; None for one that ran alone."""
        if (self.get("pack.size") or 1) < 2:
            return None
        time = self.record["time"]
        return (self.get("pack.size"), self.get("host"), self.get("pid"), time["startup_s"], time["train_s"])

    @property
    def rerun(self) -> str:
        """The command that runs it again, in the folder where it was started; with that folder where it needs it."""
        return records.rerun_anywhere(self.record)

    @property
    def ended(self) -> str:
        """Why training ended: ``max_steps``, early stopping, the sweep or the last step; empty without a result."""
        if self.status == PRUNED:
            return f"ended by the sweep: {(self.get('stopped_early') or {}).get('why') or 'no reason recorded'}"
        if not self.ok:
            return ""
        early, steps, max_steps = self.get("stopped_early"), self.get("time.steps"), self.setting("trainer.max_steps")
        epochs = self.setting("trainer.max_epochs")
        if not isinstance(max_steps, int) or max_steps < 0 or epochs:  # how many steps that is depends on the rows
            max_steps = f"{epochs} epochs" if epochs else steps
        if isinstance(early, dict) and early.get("why"):
            return f"stopped early at step {early.get('step')} of {max_steps}: {early['why']}"
        if isinstance(early, dict):
            best = early.get("best")
            value = f"{best:.4f}" if is_number(best) else "its best"
            text = f"stopped early at step {early.get('step')} of {max_steps}"
            return f"{text}: {early.get('metric')} was not better than {value}"
        if epochs:
            return "max_epochs"
        return "max_steps" if steps == max_steps or steps is None else f"ended at step {steps} of {max_steps}"

    @property
    def reason(self) -> str:
        """Why it has no result, on one line."""
        error = self.record["error"]
        if isinstance(error, Mapping):
            error = error.get("message") or label(error)
        if error:
            return " ".join(str(error).split())
        gone = self.status == "interrupted" and self.record["status"] == "running"
        return {
            MISSING: "no record: not started yet, or killed before its first write",
            PRUNED: self.ended,
            "running": "still running",
            STALE: f"{self.get('stale')}: no result of what is there now; running it again replaces it",
            UNSCORED: f"completed, but {self.metric} is no finite number: that is no result",
            IMPORTED: f"trained elsewhere; loralab import with {self.metric}=VALUE gives it a result",
        }.get(self.status, "its process is gone" if gone else "no reason recorded")

    def curves(self) -> list[Json]:
        """Rows of ``metrics.jsonl``; a line torn by a kill is left out."""
        try:
            text = (self.folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return []
        rows = [row for row in _rows(text.splitlines()) if isinstance(row, dict)]
        return [row for row in rows if is_number(row.get("step")) and abs(row["step"]) < 1e15]


def read_trial(path: Path, entry: Mapping[str, Any] | None = None) -> TrialResult:
    """The trial there, or what ``entry`` of sweep.json says of it where its record is damaged."""
    try:
        record = _shared(_checked(path, records.read(path)))
    except ArtifactError as error:
        return _of(path, {**_blank(entry or {"trial": path.name}), "error": str(error)}, DAMAGED)
    return _of(path, record, _status(record))


def _of(path: Path, record: Json, status: str) -> TrialResult:
    return TrialResult(path, record, status, configuration=identity(record))


def _shared(record: Json) -> Json:
    """The record with its sections, and its configuration's, as those of other trials that are equal to them."""
    config = {name: section(value) for name, value in record["config"].items()}
    return {**{name: value if name in _OWN else section(value) for name, value in record.items()}, "config": config}


def listed_trial(sweep: Path, entry: Json) -> TrialResult:
    """The trial of an entry of sweep.json; status MISSING where it has no record.

    The sweep may have been moved, and its entries may be relative to it or to where it was started.
    """
    here, written = sweep / entry["folder"], Path(entry["folder"])
    if (here / records.RESULT).exists():
        return read_trial(here, entry)
    moved = [path for path in (written, sweep / written.name) if (path / records.RESULT).exists()]
    return read_trial(moved[0], entry) if moved else _of(here, _blank(entry), MISSING)


def dated(trials: Sequence[TrialResult]) -> list[TrialResult]:
    """The trials; with status STALE, and the reason in its record, where base, tokenizer or data of one have changed
    since. Fingerprints are taken once, and trials of the same sections are compared once."""
    looked_up: staleness.Known = {}
    reasons: dict[Pack, str] = {}

    def now(trial: TrialResult) -> TrialResult:
        record, config = trial.record, trial.record["config"]
        about = [config.get("model"), config.get("data"), *(record[name] for name in ("base", "data", "code"))]
        key = (record["schema"], record.get("cwd"), *map(id, about))
        if key not in reasons:
            reasons[key] = staleness.of_record(record, looked_up)
        reason = reasons[key]
        return replace(trial, record={**record, "stale": reason}, status=STALE) if reason else trial

    return [now(trial) if trial.ok else trial for trial in trials]


def _score(record: Json, metric: str) -> float | None:
    value = record["metrics"].get(metric)
    return float(value) if is_number(value) and math.isfinite(value) else None


def _metric(record: Json) -> str:
    return str(record["config"].get("metric") or "val/loss")


def _status(record: Json) -> str:
    """The record's; a run whose process is gone from this machine was interrupted, and one that completed without its
    metric has no result, unless it was imported."""
    if record["status"] == "completed":
        metric = _metric(record)
        expected = "metric" in record["config"] or metric in record["metrics"]
        if not expected or _score(record, metric) is not None:
            return "completed"
        return IMPORTED if str(record["adapter"].get("note") or "").startswith("imported from") else UNSCORED
    return records.status(record)


def _checked(path: Path, record: Json) -> Json:
    """Raises ArtifactError where a part of the configuration is of another kind than loralab writes; the rest of the
    record has been read by its schema."""
    config = record["config"]
    wrong = [key for key in _GROUPS if not isinstance(config.get(key), Mapping | None)]
    wrong += [key for key in _SETTINGS if isinstance(lookup(config, key), list | Mapping)]
    if wrong:
        keys = ", ".join(f"config.{key}" for key in wrong)
        raise ArtifactError(f"{path / records.RESULT}: damaged: {keys} of another kind than loralab writes")
    return record


def _blank(entry: Mapping[str, Any]) -> Json:
    overrides, choices = entry.get("overrides") or (), entry.get("choices") or {}
    return records.blank(str(entry.get("trial") or ""), overrides=overrides, choices=choices)


def _rows(lines: Sequence[str]) -> list[Any]:
    """What each line holds, None of one that is torn. Lines of one object each are read at once, which takes a third of
    the time: as many objects as braces are one a line, so no torn line has been made whole by the next one."""
    if all(line[:1] == "{" and line.count("{") == 1 for line in lines):
        rows = _json(f"[{','.join(lines)}]")
        if isinstance(rows, list) and len(rows) == len(lines):
            return rows
    return [_json(line) for line in lines]


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None

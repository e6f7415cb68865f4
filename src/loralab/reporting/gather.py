"""A folder of records as one study: its trials, what varies between them, what each is called."""

import json
import os
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab import record as records
from loralab.errors import ArtifactError
from loralab.reporting.axes import Record, as_number, axis_value, label, sort_key, varying

MISSING = "missing"  # listed by the sweep, but has left no record yet


@dataclass(frozen=True)
class Trial:
    """One trial: ``values`` are the labels of its axes; ``record`` is blank where none was written."""

    folder: Path
    record: Record
    status: str
    values: dict[str, str]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def ok(self) -> bool:
        return self.status == "completed"

    @property
    def seed(self) -> str:
        return label(self.record["seed"]) if self.record["seed"] is not None else self.values.get("seed", "?")


@dataclass(frozen=True)
class Study:
    """``axes``: name -> labels in order, without the seed; ``about``: what else sweep.json says."""

    folder: Path
    name: str
    question: str
    axes: dict[str, list[str]]
    trials: list[Trial]
    metric: str
    mode: str
    about: Record

    def count(self, *statuses: str) -> int:
        return sum(trial.status in statuses for trial in self.trials)

    @property
    def completed(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.ok]

    @property
    def broken(self) -> list[Trial]:
        """Trials that ended without a result, or were never started."""
        return [trial for trial in self.trials if not trial.ok and trial.status != "running"]


def study(folder: Path) -> Study:
    """Read the sweep, the run, or the folder of runs at ``folder``."""
    sweep = _sweep(folder)
    found = _listed(folder, sweep) if sweep.get("trials") else _unlisted(folder)
    if not found:
        raise ArtifactError(
            f"{folder}: nothing to report; looked for {records.SWEEP} there, {records.RESULT} there and below"
        )
    config_records = [record for _, record, _ in found if record["config"]]
    declared = {str(axis): [label(v) for v in _aslist(values)] for axis, values in sweep["axes"].items()}
    names = [*declared, *varying(config_records, list(declared))]
    trials = [
        Trial(path, record, status, {name: axis_value(record, name) for name in names})
        for path, record, status in found
    ]
    axes = {name: _ordered(declared.get(name, []), trials, name) for name in names if name != "seed"}
    metric = _common(config_records, "metric", "val/loss")
    mode = _common(config_records, "metric_mode", "min")
    return Study(folder, sweep["name"], sweep["question"] or "", axes, trials, metric, mode, sweep)


def state(record: Record) -> str:
    """The record's status; a run whose process is gone from this machine was interrupted."""
    gone = record["status"] == "running" and record.get("host") == socket.gethostname() and not _alive(record)
    return "interrupted" if gone else str(record["status"])


def reason(trial: Trial) -> str:
    """Why a trial has no result, on one line."""
    error = trial.record["error"]
    if isinstance(error, Mapping):
        error = error.get("message") or label(error)
    if error:
        return " ".join(str(error).split())
    gone = trial.status == "interrupted" and trial.record["status"] == "running"
    return {
        MISSING: "no record: not started yet, or killed before its first write",
        "pruned": "stopped early by the sweep",
        "running": "still running",
    }.get(trial.status, "its process is gone" if gone else "no reason recorded")


def curves(folder: Path) -> list[Record]:
    """Rows of ``metrics.jsonl``; a line torn by a kill is left out."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    rows = [_row(line) for line in lines]
    return [row for row in rows if row is not None and isinstance(row.get("step"), int | float)]


def _row(line: str) -> Record | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _alive(record: Record) -> bool:
    if os.name != "posix" or not isinstance(record.get("pid"), int):
        return True  # nothing says otherwise
    try:
        os.kill(record["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sweep(folder: Path) -> Record:
    if (folder / records.SWEEP).exists():
        return records.read_sweep(folder)
    return {"name": folder.resolve().name, "question": "", "axes": {}, "trials": []}


def _unlisted(folder: Path) -> list[tuple[Path, Record, str]]:
    found = [(path, records.read(path)) for path in records.find(folder)]
    return [(path, record, state(record)) for path, record in found]


def _listed(folder: Path, sweep: Record) -> list[tuple[Path, Record, str]]:
    return [_listed_trial(folder, entry) for entry in sweep["trials"]]


def _listed_trial(folder: Path, entry: Record) -> tuple[Path, Record, str]:
    """The sweep may have been moved, and its entries may be relative to it or to where it was started."""
    written = Path(entry["folder"])
    places = [folder / written, written, folder / written.name]
    path = next((place for place in places if (place / records.RESULT).exists()), places[0])
    if (path / records.RESULT).exists():
        record = records.read(path)
        return path, record, state(record)
    empty = records.blank(str(entry.get("trial", "")), overrides=entry.get("overrides") or ())
    return path, {**empty, "choices": dict(entry.get("choices") or {})}, MISSING


def _ordered(declared: list[str], trials: list[Trial], axis: str) -> list[str]:
    seen = {trial.values[axis] for trial in trials} - set(declared) - {"?"}
    return [
        *dict.fromkeys(declared),
        *sorted(seen, key=lambda text: (as_number(text) is None, sort_key(text))),
    ]


def _aslist(values: Any) -> list[Any]:
    return list(values) if isinstance(values, list | tuple) else [values]


def _common(found: Sequence[Record], key: str, default: str) -> str:
    named = Counter(str(record["config"].get(key) or default) for record in found)
    return named.most_common(1)[0][0] if named else default

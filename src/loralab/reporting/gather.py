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
from loralab.reporting.axes import Record, as_number, aside, axis_value, identity, label, lookup, sort_key, varying

MISSING = "missing"  # listed by the sweep, but has left no record yet
DAMAGED = "damaged"  # has a record that cannot be read

Found = tuple[Path, Record, str]


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
    """``axes``: name -> labels in order, without the seed; ``about``: what else sweep.json says.

    ``repeats``: how often a trial was found again; each counts once.
    """

    folder: Path
    name: str
    question: str
    axes: dict[str, list[str]]
    trials: list[Trial]
    metric: str
    mode: str
    about: Record
    repeats: int = 0

    @property
    def single(self) -> bool:
        """Whether this is the folder of one run."""
        return [trial.folder for trial in self.trials] == [self.folder]

    def count(self, *statuses: str) -> int:
        return sum(trial.status in statuses for trial in self.trials)

    @property
    def broken(self) -> list[Trial]:
        """Trials that ended without a result, or were never started."""
        return [trial for trial in self.trials if not trial.ok and trial.status != "running"]


def study(folder: Path) -> Study:
    """Read the sweep, the run, or the folder of runs at ``folder``."""
    sweep = _sweep(folder)
    listed = [_listed(folder, entry) for entry in sweep["trials"]] or [_read(path) for path in records.find(folder)]
    found = _once(listed)
    if not found:
        raise ArtifactError(
            f"{folder}: nothing to report; looked for {records.SWEEP} there, {records.RESULT} there and below"
        )
    if [(path, status) for path, _, status in found] == [(folder, DAMAGED)]:
        raise ArtifactError(found[0][1]["error"])
    return _assemble(folder, sweep, found, len(listed) - len(found))


def comparable(whole: Study) -> list[Study]:
    """One study for each task, data and metric: only within one do means compare."""
    heads: dict[str, Trial] = {}
    for trial in whole.trials:
        if trial.ok:
            heads.setdefault(_ground(trial), trial)
    if len(heads) < 2:
        return [whole]
    places = [_ground(trial) if trial.ok else _likely(whole, trial, heads) for trial in whole.trials]
    parts, axes = [], whole.axes.items()
    for key in heads:
        inside = [trial for trial, place in zip(whole.trials, places, strict=True) if place == key]
        found = [(trial.folder, trial.record, trial.status) for trial in inside]
        present = {axis: [v for v in labels if any(t.values[axis] == v for t in inside)] for axis, labels in axes}
        moving = {axis: labels for axis, labels in present.items() if len(labels) > 1}
        parts.append(_assemble(whole.folder, {**whole.about, "axes": moving}, found))
    return parts


def subject(part: Study) -> str:
    """What a comparable set is about: ``docstrings f967626fe70ef416, causal_lm: val/loss``."""
    head = next((trial.record for trial in part.trials if trial.ok), part.trials[0].record)
    data = " ".join(str(head["data"][key]) for key in ("name", "fingerprint") if head["data"][key])
    about = [text for text in (data, lookup(head["config"], "model.task")) if text]
    return f"{', '.join(about) or 'data not known'}: {part.metric}"


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
    return [row for row in rows if row is not None and _is_step(row.get("step"))]


def _is_step(step: Any) -> bool:
    return isinstance(step, int | float) and abs(step) < 1e15


def _row(line: str) -> Record | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _alive(record: Record) -> bool:
    pid = record.get("pid")
    if os.name != "posix" or not isinstance(pid, int):
        return True  # nothing says otherwise
    try:
        os.kill(max(pid, 0) or 2**31, 0)  # 0 and below would mean groups of processes
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _sweep(folder: Path) -> Record:
    if (folder / records.SWEEP).exists():
        return records.read_sweep(folder)
    return {"name": folder.resolve().name, "question": "", "axes": {}, "trials": []}


def _read(path: Path, entry: Mapping[str, Any] | None = None) -> Found:
    """The record there, or what ``entry`` of sweep.json says of it where it is damaged."""
    try:
        record = records.read(path)
    except ArtifactError as error:
        return path, {**_blank(entry or {"trial": path.name}), "error": str(error)}, DAMAGED
    return path, record, state(record)


def _listed(folder: Path, entry: Record) -> Found:
    """The sweep may have been moved, and its entries may be relative to it or to where it was started."""
    written = Path(entry["folder"])
    places = [folder / written, written, folder / written.name]
    path = next((place for place in places if (place / records.RESULT).exists()), None)
    return (places[0], _blank(entry), MISSING) if path is None else _read(path, entry)


def _blank(entry: Mapping[str, Any]) -> Record:
    overrides, choices = entry.get("overrides") or (), entry.get("choices") or {}
    return records.blank(str(entry.get("trial") or ""), overrides=overrides, choices=choices)


def _once(found: Sequence[Found]) -> list[Found]:
    """Each trial once, as its last completed record has it: ``seed=0,0`` is one seed, a repetition no second one."""
    kept: dict[str, Found] = {}
    for path, record, status in found:
        key = f"{record['trial']} {identity(record)} {record['seed']}" if record["config"] else str(path)
        if status == "completed" or key not in kept:
            kept[key] = (path, record, status)
    return list(kept.values())


def _assemble(folder: Path, sweep: Record, found: Sequence[Found], repeats: int = 0) -> Study:
    configured = [record for _, record, _ in found if record["config"]]
    declared = {str(axis): [label(v) for v in _aslist(values)] for axis, values in sweep["axes"].items()}
    declared = {axis: labels for axis, labels in declared.items() if not aside(axis) and len(found) + len(labels) > 2}
    names = [*declared, *varying(configured, list(declared))]
    trials = [
        Trial(path, record, status, {name: axis_value(record, name) for name in [*names, "seed"]})
        for path, record, status in found
    ]
    axes = {name: _ordered(declared.get(name, []), trials, name) for name in names}
    metric = _common(configured, "metric", "val/loss")
    mode = _common(configured, "metric_mode", "min")
    return Study(folder, sweep["name"], sweep["question"], axes, trials, metric, mode, sweep, repeats)


def _ground(trial: Trial) -> str:
    """Equal for trials whose scores mean the same."""
    record = trial.record
    keys = ("model.task", "metric", "metric_mode")
    return json.dumps([record["data"]["fingerprint"], *(lookup(record["config"], key) for key in keys)])


def _likely(whole: Study, trial: Trial, heads: Mapping[str, Trial]) -> str:
    """The set a trial without a result would have joined: the one whose data settings are most like its own."""
    keys = [axis for axis in whole.axes if axis.split(".")[0] in ("data", "model")]
    return max(heads, key=lambda key: sum(heads[key].values[axis] == trial.values[axis] for axis in keys))


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

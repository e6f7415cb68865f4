"""A folder of records as one study: its trials, what varies between them, what each is called."""

import json
import math
import os
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loralab.config import staleness
from loralab.errors import ArtifactError
from loralab.records import record as records
from loralab.reporting import environments
from loralab.reporting.axes import (
    UNKNOWN,
    Record,
    aside,
    axis_value,
    canonical,
    identity,
    is_number,
    label,
    lookup,
    names,
    sort_key,
    spelled,
    varying,
)

MISSING = "missing"  # listed by the sweep, but has left no record yet
DAMAGED = "damaged"  # has a record that cannot be read
STALE = "stale"  # completed, on a base, tokenizer or data files that have changed since
UNSCORED = "without_result"  # completed, but its metric is no finite number

# Of a record: what must be one value, not a list of several.
_GROUPS = ("model", "data", "adapter", "optimizer", "trainer", "quantization", "schedule")
_PLAIN = (
    *("metric", "metric_mode", "model.name_or_path", "model.tokenizer", "model.task", "model.max_length"),
    *("adapter.r", "adapter.lora_alpha", "optimizer.lr", "trainer.max_steps", "trainer.patience"),
)
_TEXTS = (
    *("base.fingerprint", "data.name", "data.fingerprint", "data.targets", "data.source", "data.max_length"),
    *("memory.device", "environment.threads", "environment.gpu", "environment.cpu"),
)

Found = tuple[Path, Record, str]
Pack = tuple[Any, ...]


@dataclass(frozen=True)
class Trial:
    """One trial: ``values`` are its axes' labels, each of one value; ``record`` is blank where none was written."""

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
        return self.values.get("seed", UNKNOWN)


@dataclass(frozen=True)
class Study:
    """``axes``: name -> labels in order, without the seed; ``about``: what else sweep.json says.

    ``repeats``: how often a trial was found again; each counts once. ``conflicts``: where a repetition's score is
    another. ``packs``: of each pack whose members are all here, the tokens/s of all of them together.
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
    conflicts: tuple[str, ...] = ()
    packs: Mapping[Pack, float] = field(default_factory=dict)

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
    """Read the sweep, the run, or the folder of runs at ``folder``. Raises ArtifactError where nothing can be read."""
    sweep = _sweep(folder)
    listed = [_listed(folder, entry) for entry in sweep["trials"]] or [_read(path) for path in records.find(folder)]
    looked_up: staleness.Known = {}
    found, conflicts = _once([_dated(one, looked_up) for one in listed])
    if not found:
        raise ArtifactError(
            f"{folder}: nothing to report; looked for {records.SWEEP} there, {records.RESULT} there and below"
        )
    if [(path, status) for path, _, status in found] == [(folder, DAMAGED)]:
        raise ArtifactError(found[0][1]["error"])
    packs = _rates([record for _, record, _ in found])
    axes = {axis: values for axis, values in sweep["axes"].items() if len(found) + len(values) > 2}
    whole = assemble(folder, {**sweep, "axes": axes}, found)
    return replace(whole, repeats=len(listed) - len(found), conflicts=tuple(conflicts), packs=packs)


def pack_of(record: Record) -> Pack | None:
    """Equal for trials that were trained in one pass; None for one that ran alone."""
    if (lookup(record, "pack.size") or 1) < 2:
        return None
    time = record["time"]
    return (record["pack"]["size"], record.get("host"), record.get("pid"), time["startup_s"], time["train_s"])


def _rates(found: Sequence[Record]) -> dict[Pack, float]:
    """A record has its own tokens over the pack's seconds: together they are the pack's."""
    members: dict[Pack, list[Any]] = {}
    for record in found:
        if (pack := pack_of(record)) is not None:
            members.setdefault(pack, []).append(record["time"]["tokens_per_s"])
    return {pack: sum(rates) for pack, rates in members.items() if len(rates) == pack[0] and None not in rates}


def score(record: Record, metric: str) -> float | None:
    """The finite number that a completed record has for a metric."""
    value = record["metrics"].get(metric) if record["status"] == "completed" else None
    return float(value) if is_number(value) and math.isfinite(value) else None


def state(record: Record) -> str:
    """The record's status; a run whose process is gone from this machine was interrupted, and one that completed
    without its metric has no result."""
    if record["status"] == "completed":
        named = "metric" in record["config"] or _metric(record) in record["metrics"]
        return UNSCORED if named and score(record, _metric(record)) is None else "completed"
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
        STALE: f"{trial.record.get('stale')}: no result of what is there now; running it again replaces it",
        UNSCORED: f"completed, but {_metric(trial.record)} is no finite number: that is no result",
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
    return is_number(step) and abs(step) < 1e15


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
    """sweep.json; where it cannot be read, ``damaged`` says why and the records below speak for themselves."""
    blank: Record = {"name": folder.resolve().name, "question": "", "axes": {}, "trials": []}
    if not (folder / records.SWEEP).exists():
        return blank
    try:
        sweep = records.read_sweep(folder)
    except ArtifactError as error:
        if not records.find(folder):
            raise
        return {**blank, "damaged": str(error)}
    return {**sweep, "axes": {str(axis): _values(texts) for axis, texts in sweep["axes"].items()}}


def _read(path: Path, entry: Mapping[str, Any] | None = None) -> Found:
    """The record there, or what ``entry`` of sweep.json says of it where it is damaged."""
    try:
        record = _sound(path, records.read(path))
    except ArtifactError as error:
        return path, {**_blank(entry or {"trial": path.name}), "error": str(error)}, DAMAGED
    return path, record, state(record)


def _dated(found: Found, looked_up: staleness.Known) -> Found:
    """A completed record on what has changed since is stale, and ``stale`` in it says why."""
    path, record, status = found
    why = staleness.of_record(record, looked_up) if status == "completed" else ""
    return (path, {**record, "stale": why}, STALE) if why else found


def _sound(path: Path, record: Record) -> Record:
    """Raises ArtifactError where a part of the record is of another kind than loralab writes."""
    kinds = {
        "config": Mapping,
        "metrics": Mapping,
        "choices": Mapping,
        "cwd": str | None,
        "host": str | None,
        "pid": int | None,
    }
    wrong = [key for key, kind in kinds.items() if not isinstance(record.get(key), kind)]
    if not wrong:
        groups = [key for key in _GROUPS if not isinstance(record["config"].get(key), Mapping | None)]
        plain = [key for key in _PLAIN if isinstance(lookup(record["config"], key), list | Mapping)]
        wrong = [f"config.{key}" for key in [*groups, *plain]]
        wrong += [f"choices.{key}" for key, value in record["choices"].items() if not isinstance(value, str | None)]
        wrong += [key for key in _TEXTS if isinstance(lookup(record, key), list | Mapping)]
    if wrong:
        raise ArtifactError(f"{path / records.RESULT}: damaged: {', '.join(wrong)} of another kind than loralab writes")
    return record


def _listed(folder: Path, entry: Record) -> Found:
    """The sweep may have been moved, and its entries may be relative to it or to where it was started."""
    written = Path(entry["folder"])
    places = [folder / written, written, folder / written.name]
    path = next((place for place in places if (place / records.RESULT).exists()), None)
    return (places[0], _blank(entry), MISSING) if path is None else _read(path, entry)


def _blank(entry: Mapping[str, Any]) -> Record:
    overrides, choices = entry.get("overrides") or (), entry.get("choices") or {}
    return records.blank(str(entry.get("trial") or ""), overrides=overrides, choices=choices)


def _once(listed: Sequence[Found]) -> tuple[list[Found], list[str]]:
    """Each trial once, as its last completed record has it, and where another of its records has another score.

    ``seed=0,0`` is one seed, a repetition no second one; on other data, another base or elsewhere it is another trial.
    """
    kept: dict[str, Found] = {}
    conflicts = []
    for one in listed:
        path, record, status = one
        key = _key(path, record)
        before = kept.get(key)
        if before is None or status == "completed":
            kept[key] = one
        if before is not None and before[2] == status == "completed":
            conflicts += _conflict(before, one)
    done = {_bare(record) for _, record, status in kept.values() if status == "completed"} - {None}
    return [one for one in kept.values() if one[2] == "completed" or _bare(one[1]) not in done], conflicts


def _key(path: Path, record: Record) -> str:
    if not record["config"]:
        return str(path)
    marks = [lookup(record, f"{part}.fingerprint") for part in ("data", "base")]
    return canonical([_bare(record), record["schema"], *marks, environments.environment(record)])


def _bare(record: Record) -> str | None:
    """The trial that a record is of, wherever it ran; None where it does not say."""
    if not record["config"]:
        return None
    return canonical([identity(record), record["seed"], _metric(record), record["config"].get("metric_mode")])


def _conflict(before: Found, after: Found) -> list[str]:
    metric = _metric(after[1])
    old, new = (score(record, metric) for _, record, _ in (before, after))
    if old == new:
        return []
    return [f"{before[0].name} and {after[0].name} are one trial, yet {metric} is {old} and {new}; the latter counts"]


def assemble(folder: Path, sweep: Record, found: Sequence[Found]) -> Study:
    """A study of the records ``found``: the axes of ``sweep``, with its values first, then others that vary."""
    configured = [record for _, record, _ in found if record["config"]]
    declared: dict[str, list[Any]] = {axis: values for axis, values in sweep["axes"].items() if not aside(axis)}
    keys = [*declared, *varying(configured, list(declared))]
    columns = {key: [axis_value(record, key) for _, record, _ in found] for key in [*keys, "seed"]}
    labels = {key: names([*declared.get(key, []), *values]) for key, values in columns.items()}
    axes = {key: _ordered(declared.get(key, []), columns[key], labels[key]) for key in keys}
    texts = {key: [labels[key][canonical(value)] for value in values] for key, values in columns.items()}
    if places := environments.labels([(record, status == "completed") for _, record, status in found]):
        texts[environments.AXIS], axes[environments.AXIS] = places, list(dict.fromkeys(places))
    trials = [
        Trial(path, record, status, {key: values[index] for key, values in texts.items()})
        for index, (path, record, status) in enumerate(found)
    ]
    metric = _common(configured, "metric", "val/loss")
    mode = _common(configured, "metric_mode", "min")
    return Study(folder, sweep["name"], sweep["question"], axes, trials, metric, mode, sweep)


def _ordered(declared: Sequence[Any], seen: Sequence[Any], labels: Mapping[str, str]) -> list[str]:
    """The labels of an axis: as declared, then what else was seen, numbers first."""
    first = dict.fromkeys(canonical(value) for value in declared)
    rest = {canonical(value) for value in seen} - set(first) - {UNKNOWN}
    return [labels[key] for key in [*first, *sorted(rest, key=sort_key)]]


def _values(texts: Any) -> list[Any]:
    """An axis of sweep.json, which has its values as the overrides spell them."""
    listed = texts if isinstance(texts, list) else [texts]
    return [spelled(one) if isinstance(one, str) else one for one in listed]


def _metric(record: Record) -> str:
    return str(record["config"].get("metric") or "val/loss")


def _common(found: Sequence[Record], key: str, default: str) -> str:
    named = Counter(str(record["config"].get(key) or default) for record in found)
    return named.most_common(1)[0][0] if named else default

"""Where the figures of ``loralab subspace`` lie, and whether they are those of a trial as it is; no tensor is read."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.analysis.results import SweepResults
from loralab.analysis.trials import TrialResult
from loralab.analysis.values import as_number
from loralab.records import record as records

RANK = "adapter.r"
SCHEMA = 1
DIRECTIONS = 64  # of an update that has no r
INTRUDERS_OF = 10  # the largest singular values of W + Delta W that are looked at
INTRUDER_COSINE = 0.5  # epsilon


@dataclass(frozen=True)
class Pair:
    """Two completed trials that differ in ``by`` alone: rank, seed, or rank and seed."""

    by: str
    first: TrialResult
    second: TrialResult


def asked(results: SweepResults) -> bool:
    return results.about.get("subspace") is True


def pairs(results: SweepResults) -> list[Pair]:
    """Of each setting and seed the smallest rank with the largest; the first seed's smallest with the second seed's
    largest, since the draws of one seed begin alike; of each setting and rank the first seed with every other."""
    completed, found = [trial for trial in results.trials if trial.ok], list[Pair]()
    ranked = [sorted(group, key=_rank) for group in _groups(completed, RANK)]
    ends = [(group[0], group[-1]) for group in ranked if _rank(group[0]) < _rank(group[-1])]
    found += [Pair("rank", small, large) for small, large in ends]
    for first, *others in _groups([small for small, _ in ends], "seed"):
        found += [Pair("rank and seed", first, large) for small, large in ends if small in others[:1]]
    for first, *others in _groups(completed, "seed"):
        found += [Pair("seed", first, other) for other in others]
    return found


def single(trial: TrialResult) -> dict[str, Any] | None:
    """The figures of a trial; None where there are none of all layers of its present record."""
    stored = _read(path_of(trial.folder))
    return stored if stored is not None and _is_of([stored.get("run")], [trial]) else None


def both(pair: Pair) -> dict[str, Any] | None:
    """The same of a pair."""
    stored = _read(path_of(pair.first.folder, pair.second.record))
    return stored if stored is not None and _is_of(stored.get("runs"), [pair.first, pair.second]) else None


def _is_of(about: Any, trials: list[TrialResult]) -> bool:
    if not isinstance(about, list) or len(about) != len(trials):
        return False
    marks = [one.get("result") if isinstance(one, dict) else None for one in about]
    return marks == [fingerprint(trial.folder) for trial in trials]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(stored, dict) and stored.get("schema") == SCHEMA and stored.get("pattern") is None
    return stored if whole else None


def _groups(trials: list[TrialResult], axis: str) -> Iterator[list[TrialResult]]:
    """Trials that are alike in every axis but this one, the seed among the axes, in their order."""
    groups: dict[tuple[tuple[str, str], ...], list[TrialResult]] = {}
    for trial in trials:
        if axis in trial.values:
            key = tuple(sorted((name, value) for name, value in trial.values.items() if name != axis))
            groups.setdefault(key, []).append(trial)
    yield from groups.values()


def _rank(trial: TrialResult) -> float:
    return as_number(trial.values[RANK]) or 0.0


def fingerprint(folder: Path) -> str:
    """Of the run's result.json: another one means that the run has been made again."""
    return hashlib.sha256((folder / records.RESULT).read_bytes()).hexdigest()[:16]


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all, a layer a line. Raises DiskError."""
    head = json.dumps({**content, "layers": None}, indent=1, allow_nan=False).removesuffix('"layers": null\n}')
    lines = [f"  {json.dumps(name)}: {json.dumps(one, allow_nan=False)}" for name, one in content["layers"].items()]
    records.replace_text(path, f'{head}"layers": {{\n' + ",\n".join(lines) + "\n }\n}\n")


def path_of(folder: Path, other: Mapping[str, Any] | None = None) -> Path:
    """Where the figures of a run lie, or with the record of ``other`` those of the two."""
    return folder / (f"subspace_{other['trial']}.json" if other is not None else "subspace.json")

"""``sweep.subspace``: ``loralab subspace`` for a sweep's trials, and for pairs that differ in rank or seed alone."""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from loralab.analysis import subspace_runs as runs
from loralab.analysis.results import SweepResults
from loralab.analysis.trials import TrialResult
from loralab.analysis.values import as_number
from loralab.errors import LoralabError
from loralab.running.inputs import Inputs

log = logging.getLogger(__name__)

RANK = "adapter.r"


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


def run(results: SweepResults) -> None:
    """Writes the files of all completed trials and pairs that are not there yet. What fails is a warning."""
    inputs = Inputs()
    trials = [trial for trial in results.trials if trial.ok and single(trial) is None]
    lacking = [pair for pair in pairs(results) if both(pair) is None]
    if trials or lacking:
        log.info("subspaces of %d trials and %d pairs", len(trials), len(lacking))
    for trial in trials:
        _try(trial, runs.path_of(trial.folder), partial(runs.measure, trial.folder, inputs))
    for pair in lacking:
        one, two = pair.first, pair.second
        _try(one, runs.path_of(one.folder, two.record), partial(runs.compare, one.folder, two.folder, inputs))


def single(trial: TrialResult) -> dict[str, Any] | None:
    """The figures of a trial; None where there are none of all layers of its present record."""
    stored = _read(runs.path_of(trial.folder))
    return stored if stored is not None and _is_of([stored.get("run")], [trial]) else None


def both(pair: Pair) -> dict[str, Any] | None:
    """The same of a pair."""
    stored = _read(runs.path_of(pair.first.folder, pair.second.record))
    return stored if stored is not None and _is_of(stored.get("runs"), [pair.first, pair.second]) else None


def _is_of(about: Any, trials: list[TrialResult]) -> bool:
    if not isinstance(about, list) or len(about) != len(trials):
        return False
    marks = [one.get("result") if isinstance(one, dict) else None for one in about]
    return marks == [runs.fingerprint(trial.folder) for trial in trials]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(stored, dict) and stored.get("schema") == runs.SCHEMA and stored.get("pattern") is None
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


def _try(trial: TrialResult, path: Path, make: Callable[[], dict[str, Any]]) -> None:
    try:
        runs.write(path, make())
    except LoralabError as error:
        log.warning("sweep.subspace: %s: %s", trial.name, error)
    except Exception as error:  # a trial whose figures cannot be had takes nothing from the sweep
        log.warning("sweep.subspace: %s: %s: %s", trial.name, type(error).__name__, error)

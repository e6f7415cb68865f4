"""The points of a search (``hydra/sweeper=optuna``) in the order in which they were asked for."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loralab.analysis.arms import Arm, Comparison, sign
from loralab.analysis.results import SweepResults
from loralab.analysis.steps import saved, steps
from loralab.analysis.trials import PRUNED, TrialResult
from loralab.analysis.values import Json, is_number

ENDED, OTHER = "ended early", "without a score"
TEST = "test/"


@dataclass(frozen=True)
class Point:
    """``number``: from 1 on. ``score``: the mean over seeds of the metric, of a point that ended early at the step
    where it did; None where there is none."""

    number: int
    arm: Arm
    score: float | None
    state: str  # completed, ended early, without a score


def points(comparison: Comparison) -> list[Point]:
    """Of all arms of a search, as they were asked for."""
    places = {trial.folder: place for place, trial in enumerate(comparison.results.trials)}
    asked = sorted(comparison.arms, key=lambda arm: min(places[trial.folder] for trial in arm.trials))
    return [_point(number, arm) for number, arm in enumerate(asked, 1)]


def _point(number: int, arm: Arm) -> Point:
    if arm.mean is not None and len(arm.ok) == len(arm.trials):
        return Point(number, arm, arm.mean, "completed")
    if any(trial.status == PRUNED for trial in arm.trials):
        scores = [value for trial in arm.trials if (value := _at_pause(trial, arm.results.metric)) is not None]
        whole = len(scores) == len(arm.trials)
        return Point(number, arm, sum(scores) / len(scores) if whole else None, ENDED)
    return Point(number, arm, None, OTHER)


def _at_pause(trial: TrialResult, metric: str) -> float | None:
    """What it scored where it paused last."""
    pauses = trial.get("pauses") or []
    value = pauses[-1]["metrics"].get(metric) if pauses else None
    return float(value) if is_number(value) and math.isfinite(value) else None


def best_so_far(found: Sequence[Point], mode: str) -> list[tuple[int, float]]:
    """(number, best score of the completed points up to it), from the first of them on."""
    best: list[tuple[int, float]] = []
    for point in found:
        own = [point.score] if point.state == "completed" and point.score is not None else []
        known = [*own, *([best[-1][1]] if best else [])]
        if known:
            best.append((point.number, min(known, key=lambda score: sign(mode) * score)))
    return best


def answer(comparison: Comparison) -> str:
    """The best point, by validation and, where it was scored, on the test split."""
    found = points(comparison)
    completed = [point for point in found if point.state == "completed"]
    if not completed:
        return "There is no answer yet: no point of the search is completed."
    results = comparison.results
    best = min(completed, key=lambda point: sign(results.mode) * (point.score or 0.0))
    return (
        f"Of {len(completed)} completed points of {len(found)} the best by {results.metric} is {best.arm.name}:"
        f" {best.score:.4f}{_tested(best.arm)}; it was point {best.number}."
    )


def _tested(arm: Arm) -> str:
    name = TEST + arm.results.metric.rpartition("/")[2]
    value = arm.means.get(name)
    return "" if value is None or name == arm.results.metric else f" ({name} {value:.4f})"


def sentences(comparison: Comparison) -> Iterator[str]:
    """How the points were asked for, what became of them, and how their scores are to be read."""
    results = comparison.results
    search: Mapping[str, Any] = results.about["search"]
    counts = {"complete": "complete", "pruned": "ended early", "infeasible": "diverged or out of memory"}
    counts |= {"failed": "failed"}
    told = ", ".join(f"{search[key]} {words}" for key, words in counts.items() if search.get(key))
    yield (
        f"A search by {search.get('sampler')}, {search.get('batch')} points at a time: {search.get('points')} of"
        f" {search.get('n_trials')} points were asked for{f' ({told})' if told else ''}"
    )
    if refused := search.get("refused"):
        most = max(float(one["excess_gib"]) for one in refused)
        yield f"{len(refused)} more points were predicted to need up to {most:.3g} GiB too much, and were not trained"
    if text := saved(results.trials):
        yield f"By ending points early {text}"
    yield (
        "Rows are points, the best first: they are ranked, not compared, since each was asked for because of others;"
        f" the best {results.metric} of many is better than that point deserves{_advice(comparison)}"
    )
    if shares := search.get("importance"):
        listed = ", ".join(f"{results.short.get(key, key)} {share:.0%}" for key, share in shares.items())
        yield f"What the best points differ in from all of them (PED-ANOVA): {listed}"


def _advice(comparison: Comparison) -> str:
    name = TEST + comparison.results.metric.rpartition("/")[2]
    if any(name in arm.means for arm in comparison.arms):
        return f"; {name} is of rows on which nothing was chosen"
    return "; trainer.test=true also scores the rows on which nothing was chosen"


def plain(results: SweepResults, comparisons: Sequence[Comparison]) -> dict[str, Json]:
    """``search`` of results.json: what sweep.json says of it, and its points; empty where there is none."""
    if not results.searched:
        return {}
    found = [
        {"number": one.number, "values": one.arm.values, "score": one.score, "state": one.state}
        for comparison in comparisons
        for one in points(comparison)
    ]
    made, whole = steps(results.trials)
    return {"search": {**results.about["search"], "history": found, "steps": made, "steps_without_pruning": whole}}

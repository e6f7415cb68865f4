"""Curves over steps, thin enough for a page: extremes kept, smoothed before they are thinned, averaged over seeds."""

import math
import statistics
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from loralab.analysis.values import Json, is_number

Rows = Sequence[tuple[float, ...]]  # (step, value) or (step, mean, least, greatest)
MOST_POINTS = 100
KINDS = ("train/", "val/")


@dataclass(frozen=True)
class Curves:
    """The training and validation metrics of a run: ``counts``, how many rows of metrics.jsonl have a number for each;
    of ten thousand runs the numbers take 16 bytes each."""

    counts: Counter[str] = field(default_factory=Counter)
    _steps: dict[str, "array[float]"] = field(default_factory=dict)
    _values: dict[str, "array[float]"] = field(default_factory=dict)

    @staticmethod
    def of(rows: Iterable[Json]) -> "Curves":
        """Of the rows of metrics.jsonl."""
        curves = Curves()
        for row in rows:
            for metric, value in row.items():
                if metric.startswith(KINDS) and is_number(value):
                    curves.counts[metric] += 1
                    if math.isfinite(value):
                        curves._steps.setdefault(metric, array("d")).append(row["step"])
                        curves._values.setdefault(metric, array("d")).append(value)
        return curves

    def series(self, metric: str) -> list[tuple[float, float]]:
        """(step, value) of the rows that have a finite number for the metric."""
        return list(zip(self._steps.get(metric, ()), self._values.get(metric, ()), strict=True))


def thin(rows: Rows, limit: int = MOST_POINTS) -> list[tuple[float, ...]]:
    """At most ``limit`` rows in their order: the first, the last, and of each part between them the least and the
    greatest value, so that a spike survives. ``limit`` is at least 4."""
    if len(rows) <= limit:
        return list(rows)
    parts, sampled = (limit - 2) // 2, [0]
    for index in range(parts):
        part = range(1 + (len(rows) - 2) * index // parts, 1 + (len(rows) - 2) * (index + 1) // parts)
        sampled += sorted({pick(part, key=lambda at: rows[at][1]) for pick in (min, max)})
    return [rows[at] for at in (*sampled, len(rows) - 1)]


def smoothed(rows: Rows, keep: float) -> list[tuple[float, float]]:
    """Exponential mean, corrected for its start as Adam's moments are (Kingma and Ba 2015, section 3)."""
    smooth, total, weight = [], 0.0, 0.0
    for step, value, *_ in rows:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append((step, total / weight))
    return smooth


def together(lines: Iterable[Rows]) -> list[tuple[float, ...]]:
    """(step, mean, least, greatest) over the lines that have a value at the step."""
    by_step: dict[float, list[float]] = {}
    for line in lines:
        for point in line:
            by_step.setdefault(point[0], []).append(point[1])
    return [(step, statistics.fmean(values), min(values), max(values)) for step, values in sorted(by_step.items())]


def metrics(runs: Iterable[Curves], first: Sequence[str]) -> list[str]:
    """The metrics that any run has more than once: ``first``, then the others by name."""
    counts: Counter[str] = Counter()
    for curves in runs:
        counts |= curves.counts
    return [*(key for key in first if counts.get(key)), *sorted(_further(counts, first))]


def _further(counts: Mapping[str, int], first: Sequence[str]) -> list[str]:
    return [key for key, count in counts.items() if count > 1 and key not in first]

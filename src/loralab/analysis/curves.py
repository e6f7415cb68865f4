"""Curves over steps, thin enough for a page: extremes kept, smoothed before they are thinned, averaged over seeds."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from loralab.analysis.values import Json, is_number

Rows = Sequence[tuple[float, ...]]  # (step, value) or (step, mean, least, greatest)
MOST_POINTS = 100


def series(rows: Iterable[Json], metric: str) -> list[tuple[float, float]]:
    """(step, value) of the lines of metrics.jsonl that have a finite number for the metric."""
    return [
        (float(row["step"]), float(value))
        for row in rows
        if is_number(value := row.get(metric)) and math.isfinite(value)
    ]


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


def together(lines: Sequence[Rows]) -> list[tuple[float, ...]]:
    """(step, mean, least, greatest) over the lines that have a value at the step."""
    by_step: dict[float, list[float]] = {}
    for line in lines:
        for step, value, *_ in line:
            by_step.setdefault(step, []).append(value)
    return [(step, statistics.fmean(values), min(values), max(values)) for step, values in sorted(by_step.items())]


def metrics(curves: Iterable[Sequence[Json]], first: Sequence[str]) -> list[str]:
    """The training and validation metrics that any curve has more than once: ``first``, then the others by name."""
    counts: dict[str, int] = {}
    for rows in curves:
        own: dict[str, int] = {}
        for row in rows:
            for key, value in row.items():
                if key.startswith(("train/", "val/")) and is_number(value):
                    own[key] = own.get(key, 0) + 1
        counts = {key: max(own.get(key, 0), counts.get(key, 0)) for key in [*counts, *own]}
    return [*(key for key in first if counts.get(key)), *sorted(_further(counts, first))]


def _further(counts: Mapping[str, int], first: Sequence[str]) -> list[str]:
    return [key for key, count in counts.items() if count > 1 and key not in first]

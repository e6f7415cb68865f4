"""Heat maps: the metric over two axes of numbers, a cell for each pair of values."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from loralab.analysis.arms import Comparison
from loralab.analysis.results import SweepResults
from loralab.analysis.trials import PRUNED, TrialResult
from loralab.analysis.values import Json, as_number
from loralab.reporting import charts
from loralab.reporting.charts import Figure

if TYPE_CHECKING:
    import altair as alt

MOST_NUMBERS = 64  # cells, up to which each shows its number
MOST_MAPS = 6  # of one table
LEAST_FILLED = 0.75  # of the cells, that must have been run
WORST = 3.0  # of the way from the best mean to the median one, beyond which cells share the last colour
# Cividis (Nunez, Anderton and Renslow 2018), from dark to light: even for every kind of colour vision.
COLOURS = ("#00224e", "#434e6c", "#7d7c78", "#bcae6c", "#fee838")
BEST = charts.COLOURS[1]


@dataclass(frozen=True)
class Grid:
    """The trials of two axes, ``across`` with no more values than ``down``; ``where``: what the other axes have."""

    results: SweepResults
    across: str
    down: str
    where: str
    trials: Sequence[TrialResult]

    def labels(self, axis: str) -> list[str]:
        """Those that were run, by size."""
        return sorted({trial.values[axis] for trial in self.trials}, key=float)

    def cells(self) -> dict[tuple[str, str], list[TrialResult]]:
        """The trials of each pair of values that was run."""
        found: dict[tuple[str, str], list[TrialResult]] = {}
        for trial in self.trials:
            found.setdefault((trial.values[self.across], trial.values[self.down]), []).append(trial)
        return found

    @property
    def size(self) -> int:
        return len(self.labels(self.across)) * len(self.labels(self.down))

    @property
    def shown(self) -> bool:
        """Whether it is a map: at least 2 x 3 values, most pairs run, two or more of them with a score."""
        counts = [len(self.labels(axis)) for axis in (self.across, self.down)]
        scored = [cell for cell in self.cells().values() if _scores(self.results, cell)]
        filled = len(self.cells()) >= LEAST_FILLED * self.size
        return min(counts) >= 2 and max(counts) >= 3 and filled and len(scored) >= 2


def figures(comparison: Comparison) -> Iterator[Figure]:
    """A map for each pair of numeric axes whose values were run together, and for each setting of the other axes; of a
    sweep that tunes, over all trials and the validation metric."""
    results = comparison.tuned.whole if comparison.tuned is not None else comparison.results
    maps = [grid for pair in combinations(_numeric(results), 2) for grid in _grids(results, *pair) if grid.shown]
    for number, grid in enumerate(maps[:MOST_MAPS], 1):
        left_out = f" The first {MOST_MAPS} of {len(maps)} maps." if len(maps) > MOST_MAPS else ""
        yield _figure(comparison, grid, "heat" if number == 1 else f"heat_{number}", left_out)


def _numeric(results: SweepResults) -> list[str]:
    moving = [axis for axis in results.moving() if axis not in results.led]
    return [axis for axis in moving if all(as_number(text) is not None for text in results.axes[axis])]


def _grids(results: SweepResults, one: str, other: str) -> Iterator[Grid]:
    """A grid for each setting of the axes that these two do not decide."""
    inside = [
        trial for trial in results.trials if all(as_number(trial.values[axis]) is not None for axis in (one, other))
    ]
    pairs = {(trial.values[one], trial.values[other]) for trial in inside}
    panels = [
        axis
        for axis in results.axes
        if axis not in (one, other)
        and len({(trial.values[one], trial.values[other], trial.values[axis]) for trial in inside}) > len(pairs)
    ]
    by_panel: dict[tuple[str, ...], list[TrialResult]] = {}
    for trial in inside:
        by_panel.setdefault(tuple(trial.values[axis] for axis in panels), []).append(trial)
    for panel, trials in by_panel.items():
        where = ", ".join(f"{results.short[axis]} = {text}" for axis, text in zip(panels, panel, strict=True))
        counts = {axis: len({trial.values[axis] for trial in trials}) for axis in (one, other)}
        across, down = sorted((one, other), key=counts.__getitem__)
        yield Grid(results, across, down, where, trials)


def _scores(results: SweepResults, trials: Sequence[TrialResult]) -> dict[str, float]:
    """By seed."""
    return {trial.seed: value for trial in trials if (value := trial.score(results.metric)) is not None}


def _rows(grid: Grid) -> list[Json]:
    """A row for each cell with a score; ``best``: of those with the most seeds, the best mean."""
    results = grid.results
    known = {pair: scores for pair, trials in grid.cells().items() if (scores := _scores(results, trials))}
    most = max(map(len, known.values()))
    means = {pair: statistics.fmean(scores.values()) for pair, scores in known.items()}
    full = [pair for pair, scores in known.items() if len(scores) == most]
    best = (min if results.mode == "min" else max)(full, key=means.__getitem__)
    low, high = ends(results.mode, list(means.values()))
    return [
        {
            "x": pair[0],
            "y": pair[1],
            "value": mean,
            "text": f"{mean:.4f}" if abs(mean) < 1000 else f"{mean:.4g}",
            "n": f"{len(known[pair])} of {most}",
            "ink": ink(_lightness(results.mode, mean, low, high)),
            "best": pair == best,
        }
        for pair, mean in means.items()
    ]


def ends(mode: str, means: Sequence[float]) -> tuple[float, float]:
    """The means between which the colours differ: one that diverged leaves no colour to the others."""
    sign = 1 if mode == "min" else -1
    ordered = sorted(means, key=lambda mean: sign * mean)
    best, worst = ordered[0], ordered[-1]
    end = best + WORST * (statistics.median(means) - best)
    bound = worst if end == best or sign * worst < sign * end else end
    return min(best, bound), max(best, bound)


def _lightness(mode: str, mean: float, low: float, high: float) -> float:
    """0 is the darkest, the worst colour; 1 the lightest."""
    share = min(1.0, max(0.0, (mean - low) / ((high - low) or 1.0)))
    return 1 - share if mode == "min" else share


def ink(lightness: float) -> str:
    """The colour of a number on a cell."""
    return "#000000" if lightness >= 0.5 else "#ffffff"


def _figure(comparison: Comparison, grid: Grid, stem: str, left_out: str) -> Figure:
    results, rows = grid.results, _rows(grid)
    across, down = (results.together(axis) for axis in (grid.across, grid.down))
    low, high = ends(results.mode, [row["value"] for row in rows])
    numbers = grid.size <= MOST_NUMBERS
    spec = charts.specification(
        _chart(grid, low, high, numbers), {"cells": rows}, (charts.ROW + 4) * len(grid.labels(grid.down))
    )
    place = f" ({grid.where})" if grid.where else ""
    caption = " ".join(filter(None, [*_caption(comparison, grid, rows, low, high), left_out.strip()]))
    return Figure(stem, f"{results.metric} over {across} and {down}{place}", caption, spec)


def _caption(comparison: Comparison, grid: Grid, rows: Sequence[Json], low: float, high: float) -> Iterator[str]:
    results = grid.results
    yield f"Mean over seeds of {results.metric} in each cell; {results.better}, and lighter, is better."
    fewer = [row for row in rows if len(set(row["n"].split(" of "))) > 1]
    of_full = " of those with every seed" if fewer else ""
    yield f"Framed: the best mean{of_full}, which need not be told apart from its neighbours."
    if comparison.tuned is not None:
        yield (
            "All values that were tried of what is tuned, on the validation split, by which each row's value is chosen;"
            f" the table's {comparison.results.metric} is of the test split."
        )
    if any(not low <= row["value"] <= high for row in rows):
        yield "Cells far from the best share the darkest colour."
    if fewer:
        yield f"{len(fewer)} of {len(rows)} cells lack a seed that others have."
    if empty := grid.size - len(rows):
        early = sum(all(trial.status == PRUNED for trial in trials) for trials in grid.cells().values())
        why = f", {early} of them ended early by the sweep" if early else ""
        yield f"Empty: no completed trial ({empty} of {grid.size} cells{why})."


def _chart(grid: Grid, low: float, high: float, numbers: bool) -> "alt.LayerChart":
    import altair as alt

    results = grid.results
    x = alt.X(
        "x:O",
        title=results.together(grid.across),
        scale=alt.Scale(domain=grid.labels(grid.across), padding=0.04),
        axis=alt.Axis(labelAngle=0, orient="bottom", domain=False, ticks=False),
    )
    y = alt.Y(
        "y:O",
        title=results.together(grid.down),
        scale=alt.Scale(domain=grid.labels(grid.down)[::-1], padding=0.04),
        axis=alt.Axis(domain=False, ticks=False),
    )
    range_ = list(COLOURS if results.mode == "max" else COLOURS[::-1])
    scale = alt.Scale(
        domain=[low + (high - low) * part / 4 for part in range(5)], range=range_, interpolate="rgb", clamp=True
    )
    fill = alt.Fill("value:Q", scale=scale, legend=alt.Legend(title=results.metric, gradientLength=200, format=".4~g"))
    hint = [
        alt.Tooltip("x:N", title=results.short[grid.across]),
        alt.Tooltip("y:N", title=results.short[grid.down]),
        alt.Tooltip("value:Q", title=results.metric, format=".6~g"),
        alt.Tooltip("n:N", title="seeds"),
    ]
    base = alt.Chart(alt.NamedData("cells")).encode(x=x, y=y)
    best = base.transform_filter("datum.best").mark_rect(filled=False, stroke=BEST, strokeWidth=3.5)
    texts = base.mark_text(fontSize=11).encode(text="text:N", color=alt.Color("ink:N", scale=None, legend=None))
    cells = base.mark_rect().encode(fill=fill, tooltip=hint)
    return charts.layers(cells, *([texts] if numbers else []), best)

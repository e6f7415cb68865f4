"""Figures of a search: its points as they were asked for, the score over each searched axis, what counts."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loralab.analysis.arms import Comparison
from loralab.analysis.search import OTHER, Point, best_so_far, points
from loralab.analysis.values import Json, as_number
from loralab.reporting import charts, heat
from loralab.reporting.charts import Figure, Legend

if TYPE_CHECKING:
    import altair as alt

STATES = ("completed", "ended early")
MOST_POINTS = 2000  # drawn one by one: of more, the first of each state and all that made it better


def figures(comparison: Comparison) -> Iterator[Figure]:
    """The score against the number of points with the best so far, and against each searched axis; the importance of
    the axes. None where fewer than two points have a score."""
    results, asked = comparison.results, points(comparison)
    found = [point for point in asked if point.score is not None]
    if len(found) < 2:
        return
    best, shown = best_so_far(asked, results.mode), _thinned(found, results.mode)
    low, high = heat.ends(results.mode, [point.score or 0.0 for point in found])
    margin = (high - low) * 0.06 or 1e-6
    domain = [low - margin, high + margin]
    rows = [_row(point) for point in shown]
    steps = [{"number": number, "best": value} for number, value in best]
    legends = [Legend("state", "both", [state for state in STATES if any(row["state"] == state for row in rows)])]
    legends = [legend for legend in legends if len(legend.names) > 1]
    spec = charts.specification(_history(results.metric, domain), {"points": rows, "best": steps})
    cut = " Points far from the best lie beyond the chart." if _beyond(found, low, high) else ""
    some = f" {len(shown):,} of {len(found):,} points are drawn." if len(shown) < len(found) else ""
    caption = (
        "One mark per point, the mean over its seeds; one that ended early at the step where it did. Line: the best of"
        f" the completed points so far.{cut}{some}"
    )
    yield Figure("search", f"{results.metric} in the order of asking", caption, spec, legends, "xy")
    for axis in results.searched:
        yield from _slice(comparison, axis, shown, domain, legends)
    yield from _importance(comparison)


def _thinned(found: Sequence[Point], mode: str) -> list[Point]:
    if len(found) <= MOST_POINTS:
        return list(found)
    every, best = -(-len(found) // MOST_POINTS), dict(best_so_far(found, mode))
    return [p for at, p in enumerate(found) if at % every == 0 or p.score == best.get(p.number)]


def _row(point: Point) -> Json:
    told = f"{point.score:.4f}, n = {len(point.arm.trials)}"
    return {
        "number": point.number,
        "value": point.score,
        "state": point.state,
        "name": point.arm.name,
        "score": told,
    }


def _beyond(found: Sequence[Point], low: float, high: float) -> bool:
    return any(not low <= (point.score or 0.0) <= high for point in found)


def _hint(metric: str) -> list["alt.Tooltip"]:
    import altair as alt

    return [alt.Tooltip("name:N", title="point"), alt.Tooltip("number:Q"), alt.Tooltip("score:N", title=metric)]


def _history(metric: str, domain: Sequence[float]) -> "alt.LayerChart":
    import altair as alt

    x = alt.X("number:Q", title="point", axis=alt.Axis(tickMinStep=1, grid=False), scale=alt.Scale(nice=False))
    base = alt.Chart(alt.NamedData("points")).mark_point(filled=True, opacity=0.85, size=60, clip=True)
    marks = base.encode(
        x=x,
        y=charts.y_number("value", metric, domain),
        color=charts.colour(STATES, "state"),
        shape=charts.shape(STATES, "state"),
        tooltip=_hint(metric),
    )
    line = alt.Chart(alt.NamedData("best")).mark_line(interpolate="step-after", color="#5c6570", clip=True)
    line = line.encode(x=x, y=charts.y_number("best", metric, domain))
    return charts.layers(line, marks.add_params(charts.zoom()))


def _slice(
    comparison: Comparison, axis: str, shown: Sequence[Point], domain: Sequence[float], legends: list[Legend]
) -> Iterator[Figure]:
    """The scores over one axis; the later a point, the darker."""
    results = comparison.results
    known = [(point, point.arm.values[axis]) for point in shown if point.state != OTHER]
    if len({text for _, text in known}) < 2:
        return
    numbers = [as_number(text) for _, text in known]
    is_numeric = None not in numbers
    rows = [{**_row(point), "x": as_number(text) if is_numeric else text} for point, text in known]
    about: Mapping[str, Any] = results.about["search"]["space"].get(axis) or {}
    name, order = results.short[axis], list(results.axes[axis])
    chart = _slice_chart(name, results.metric, domain, None if is_numeric else order, bool(about.get("log")))
    caption = "One mark per point, darker the later it was asked for; what else is searched differs between them."
    stem = re.sub(r"\W", "_", f"search_{name}")
    spec = charts.specification(chart, {"points": rows})
    yield Figure(stem, f"{results.metric} over {name}", caption, spec, legends, "xy" if is_numeric else "y")


def _slice_chart(
    name: str, metric: str, domain: Sequence[float], labels: Sequence[str] | None, log: bool
) -> "alt.LayerChart":
    import altair as alt

    # a logarithmic scale has no zero, and Vega-Lite warns of one
    kind = {"type": "log"} if log else {"type": "linear", "zero": False}
    scale = alt.Scale(**kind, padding=12, nice=False)
    axis = alt.Axis(grid=False, format="~g", tickCount=6)
    x = (
        alt.X("x:N", title=name, sort=list(labels), axis=alt.Axis(labelAngle=0))
        if labels is not None
        else alt.X("x:Q", title=name, scale=scale, axis=axis)
    )
    shade = alt.Color("number:Q", scale=alt.Scale(scheme="blues"), legend=alt.Legend(title="point"))
    marks = alt.Chart(alt.NamedData("points")).mark_point(filled=True, size=60, opacity=0.9, clip=True)
    marks = marks.encode(
        x=x,
        y=charts.y_number("value", metric, domain),
        color=shade,
        shape=charts.shape(STATES, "state"),
        tooltip=_hint(metric),
    )
    return charts.layers(marks.add_params(charts.zoom(("x", "y") if labels is None else ("y",))))


def _importance(comparison: Comparison) -> Iterator[Figure]:
    results = comparison.results
    shares: Mapping[str, float] = results.about["search"].get("importance") or {}
    if len(shares) < 2:
        return
    rows = [{"name": results.short.get(key, key), "value": share} for key, share in shares.items()]
    spec = charts.specification(
        charts.by_name("share of importance", 1 / len(rows)),
        {"rows": rows, "at": [{"at": 1 / len(rows)}]},
        24 * len(rows),
    )
    caption = (
        "How much the best tenth of the points differ from all of them in each axis (PED-ANOVA; Watanabe, Bansal and"
        " Hutter 2023), as shares; the line is where all count alike. Of a few dozen points this is a rough guess."
    )
    yield Figure("search_importance", "What counts", caption, spec)

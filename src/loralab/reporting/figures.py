"""Which charts a study gets, and the words under them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from loralab.reporting import svg
from loralab.reporting.axes import as_number, is_number, short_names
from loralab.reporting.gather import Study, Trial, curves
from loralab.reporting.rows import Row
from loralab.reporting.table import deviates, score_text, trial_text, where

SMOOTH = 0.8


@dataclass(frozen=True)
class Figure:
    """``body``: HTML of the legend and the drawing."""

    title: str
    caption: str
    body: str


def figures(study: Study, found: Sequence[Row]) -> list[Figure]:
    """Metric against the axes, quality against bits where quantization varies, curves."""
    return [*_metric(study, found), *_against_bits(study, found), *_curves(study, found)]


def axis_roles(study: Study) -> tuple[str | None, list[str]]:
    """The x axis, numeric if any is, and the other axes that vary, which become series and then panels."""
    moving = [axis for axis, labels in study.axes.items() if len(labels) > 1]
    numeric = [axis for axis in moving if all(as_number(text) is not None for text in study.axes[axis])]
    x = next(iter([*numeric, *moving]), None)
    return x, [axis for axis in moving if axis != x]


def _metric(study: Study, found: Sequence[Row]) -> Iterator[Figure]:
    x, others = axis_roles(study)
    scored = [row for row in found if row.mean is not None]
    if x is None or not scored:
        return
    y = svg.scale(study.metric, _extent(scored))
    short = short_names(list(study.axes))
    panels = list(dict.fromkeys(_key(row, others[1:]) for row in scored))
    for panel in panels:
        inside = [row for row in found if _key(row, others[1:]) == panel]
        if len(panels) > 1 and sum(row in scored for row in inside) < 2:
            continue  # one mark alone compares nothing
        place = ", ".join(f"{short[axis]} = {text}" for axis, text in zip(others[1:], panel, strict=True))
        yield _metric_panel(study, inside, x, others[:1], y, place)


def _metric_panel(study: Study, found: Sequence[Row], x: str, by: list[str], y: svg.Axis, place: str) -> Figure:
    labels = study.axes[x]
    numbers = [as_number(text) for text in labels]
    numeric = all(number is not None for number in numbers)
    across = [float(number or 0) for number in numbers] if numeric else [float(i) for i in range(len(labels))]
    name = short_names(list(study.axes))[x]
    axis = _x_axis(name, labels, across, numeric)
    series = [
        svg.Series(key, [_point(study, rows_at, at) for rows_at, at in _along(inside, x, labels, across)], hue)
        for key, hue, inside in _series(study, found, by)
    ]
    title = f"{study.metric} against {name}" + (f" ({place})" if place else "")
    drawn = svg.chart(series, axis, y, joined=numeric, description=title)
    spread = "Large: mean over seeds; small: each seed; bars: one standard deviation; " * deviates(found)
    caption = f"{spread}{_seeds(found)}."
    missing = _missing(found)
    caption += f" {missing}." if missing else ""
    return Figure(title, caption, _legend(series) + drawn)


def _against_bits(study: Study, found: Sequence[Row]) -> Iterator[Figure]:
    by = [axis for axis in study.axes if axis.split(".")[0] == "quantization"][:1]
    scored = [(row, bits) for row in found if (bits := row.average("base.bits_per_parameter")) and row.scores]
    if not by or len({bits for _, bits in scored}) < 2:
        return
    labels = list(dict.fromkeys(f"{bits:.4g}" for bits in sorted(bits for _, bits in scored)))
    axis = svg.places("bits per parameter of the quantized layers (in order, not to scale)", labels)
    second = next(
        (axis for axis, labels in study.axes.items() if axis != by[0] and 1 < len(labels) <= svg.SHAPES), None
    )
    series = [
        svg.Series(
            key,
            [_shaped(study, row, labels.index(f"{bits:.4g}"), second) for row, bits in scored if row in inside],
            hue,
        )
        for key, hue, inside in _series(study, found, by)
    ]
    y = svg.scale(study.metric, _extent([row for row, _ in scored]))
    better = "lower" if study.mode == "min" else "higher"
    title = "Quality against bits per parameter"
    caption = f"One mark per row; left and {better} is better; {_seeds(found)}."
    legend = svg.legend([(one.name, one.colour) for one in series], round_marks=second is not None)
    legend += svg.shape_legend(_values(study, second)) if second else ""
    yield Figure(title, caption, legend + svg.chart(series, axis, y, joined=False, description=title))


def _shaped(study: Study, row: Row, bits: float, axis: str | None) -> svg.Point | None:
    point = _point(study, [row], bits)
    labels = study.axes[axis] if axis else []
    shape = labels.index(row.values[axis]) if axis and row.values[axis] in labels else None
    return replace(point, shape=shape) if point else None


def _values(study: Study, axis: str) -> list[str]:
    return [f"{short_names(list(study.axes))[axis]} = {text}" for text in study.axes[axis]]


def _curves(study: Study, found: Sequence[Row]) -> Iterator[Figure]:
    """Training loss (raw and smoothed) and the validation metric, one line per run."""
    x, others = axis_roles(study)
    by = others[:1] or ([x] if x else [])
    second = x if others else None
    styles = dict(zip(study.axes[second], _styles(len(study.axes[second])), strict=True)) if second else {}
    runs = [
        (trial, hue, styles.get(row.values.get(second or "", ""), ""), curves(trial.folder))
        for _, hue, inside in _series(study, found, by)
        for row in inside
        for trial in row.trials
    ]
    logged = {hue for _, hue, _, rows in runs if rows}
    names = [(name, hue) for name, hue, _ in _series(study, found, by) if hue in logged]
    legend = svg.legend(names) if len(names) > 1 else ""
    legend += svg.line_legend(list(zip(_values(study, second), styles.values(), strict=True))) if second else ""
    for metric, smooth in (("train/loss", SMOOTH), (study.metric, 0.0)):
        drawn = [_curve(study, trial, hue, style, rows, metric) for trial, hue, style, rows in runs]
        drawn = [curve for curve in drawn if curve.rows]
        if drawn and (smooth or any(len(curve.rows) > 1 for curve in drawn)):
            yield _curve_figure(study, drawn, metric, smooth, legend)


def _styles(count: int) -> list[str]:
    """One look of a line for each value: dashes while they can be told apart, else shades."""
    if count <= len(svg.DASHES):
        return list(svg.DASHES[:count])
    return [f"stroke-opacity:{0.25 + 0.75 * index / (count - 1):.2f}" for index in range(count)]


def _curve_figure(study: Study, drawn: list[svg.Curve], metric: str, smooth: float, legend: str) -> Figure:
    steps = [step for curve in drawn for step, _ in curve.rows]
    values = [value for curve in drawn for _, value in curve.rows]
    y = svg.scale(metric, _without_spikes(values))
    how = f"faint: as logged; line: exponential mean ({smooth:g})" if smooth else "as logged"
    caption = f"One line per run, {len(drawn)} of {len(study.trials)} runs; {how}"
    caption += "; cross: not completed" if any(curve.broken for curve in drawn) else ""
    outside = sum(not y.low <= value <= y.high for value in values)
    caption += f"; {_beyond(outside)} its edge." if outside else "."
    body = svg.line_plot(drawn, svg.steps("optimizer step", steps), y, smooth, f"{metric} by step")
    return Figure(f"{metric} by step", caption, legend + body)


def _beyond(count: int) -> str:
    return "1 value beyond the axis touches" if count == 1 else f"{count} values beyond the axis touch"


def _curve(study: Study, trial: Trial, hue: int, style: str, rows: list[dict[str, object]], metric: str) -> svg.Curve:
    pairs = [
        (float(step), float(value))
        for row in rows
        if is_number(step := row["step"]) and is_number(value := row.get(metric)) and math.isfinite(value)
    ]
    name = trial_text(study, trial) + ("" if trial.ok else f" ({trial.status})")
    return svg.Curve(name, pairs, hue, not trial.ok, style)


def _x_axis(name: str, labels: list[str], across: list[float], numeric: bool) -> svg.Axis:
    if not numeric:
        return svg.places(name, labels)
    spread = min(across) > 0 and max(across) / min(across) >= 4
    if spread:
        return svg.powers(name, across)
    axis = svg.scale(name, across)
    return svg.Axis(name, axis.low, axis.high, [(at, f"{at:g}") for at in sorted(set(across))])


def _series(study: Study, found: Sequence[Row], by: list[str]) -> list[tuple[str, int, list[Row]]]:
    """(name, colour, rows); an option keeps its colour in every figure of the page."""
    if not by:
        return [(study.metric, 0, list(found))]
    labels = [*study.axes[by[0]], "?"]
    named = [f"{short_names(list(study.axes))[by[0]]} = {text}" if _bare(text) else text for text in labels]
    inside = [[row for row in found if row.values[by[0]] == text] for text in labels]
    split = [(name, hue, rows) for hue, (name, rows) in enumerate(zip(named, inside, strict=True))]
    return [one for one in split if one[2]]


def _bare(text: str) -> bool:
    """Whether a value says nothing without the name of its axis."""
    return as_number(text) is not None or text in ("true", "false", "null")


def _along(inside: Sequence[Row], x: str, labels: list[str], across: list[float]) -> list[tuple[list[Row], float]]:
    return [([row for row in inside if row.values[x] == text], at) for text, at in zip(labels, across, strict=True)]


def _point(study: Study, at_place: Sequence[Row], x: float) -> svg.Point | None:
    """The completed row at a place; None where there is none, or more than one without an axis between."""
    scored = [row for row in at_place if row.mean is not None]
    if len(scored) != 1 or scored[0].mean is None:
        return None
    row = scored[0]
    text = f"{where(study, row)}: {score_text(row)}, n = {row.n}"
    return svg.Point(x, scored[0].mean, row.scores if row.n > 1 else [scored[0].mean], row.std, text)


def _missing(found: Sequence[Row]) -> str:
    """How many of the rows that were asked for have no result; no line is drawn across one."""
    missing = sum(row.mean is None for row in found)
    if not missing:
        return ""
    return f"{missing} of {len(found)} rows {'has' if missing == 1 else 'have'} no completed trial"


def _legend(series: Sequence[svg.Series]) -> str:
    return svg.legend([(one.name, one.colour) for one in series]) if len(series) > 1 else ""


def _key(row: Row, axes: Sequence[str]) -> tuple[str, ...]:
    return tuple(row.values[axis] for axis in axes)


def _extent(scored: Sequence[Row]) -> list[float]:
    """Every value that the y axis must hold, error bars included."""
    ends = [(row.mean or 0.0) + side * (row.std or 0.0) for row in scored for side in (-1, 1)]
    return [*ends, *(value for row in scored for value in row.scores)]


def _without_spikes(values: Sequence[float]) -> list[float]:
    """The range of the middle 98%, so that one spike does not flatten every curve; spikes touch the edge."""
    ordered = sorted(values)
    cut = len(ordered) // 100
    return ordered[cut : len(ordered) - cut]


def _seeds(found: Sequence[Row]) -> str:
    counts = sorted({row.n for row in found if row.scores})
    if not counts:
        return "no completed seed"
    if counts == [1]:
        return "n = 1 seed"
    return f"n = {counts[0]} seeds" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]} seeds"

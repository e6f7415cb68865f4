"""The figures of a comparison and their captions."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from markupsafe import Markup

from loralab.analysis.arms import Arm, Comparison
from loralab.analysis.results import SweepResults
from loralab.analysis.trials import TrialResult
from loralab.analysis.values import UNKNOWN, Json, as_number, is_number
from loralab.reporting import svg
from loralab.reporting.table import score_text

SMOOTH = 0.8
BITS = "base.bits_per_parameter"


@dataclass(frozen=True)
class Figure:
    """A drawing with its title, caption and legends."""

    title: str
    caption: str
    drawing: Markup
    legends: list[list[svg.LegendEntry]] = field(default_factory=list)


@dataclass(frozen=True)
class Group:
    """The arms that have one value on an axis; they keep their colour in every figure of the page."""

    name: str
    colour: int
    arms: list[Arm]


def figures(comparison: Comparison) -> list[Figure]:
    """Metric against the axes, quality against bits where quantization varies, curves."""
    return [*_metric(comparison), *_against_bits(comparison), *_curves(comparison)]


def axis_roles(results: SweepResults) -> tuple[str | None, list[str]]:
    """The x axis, numeric if any is, and the other axes that vary, which become series and then panels."""
    moving = [axis for axis, labels in results.axes.items() if len(labels) > 1]
    numeric = [axis for axis in moving if all(as_number(text) is not None for text in results.axes[axis])]
    x = next(iter([*numeric, *moving]), None)
    return x, [axis for axis in moving if axis != x]


def _metric(comparison: Comparison) -> Iterator[Figure]:
    results, scored = comparison.results, comparison.contenders
    x, others = axis_roles(results)
    if x is None or not scored:
        return
    y = svg.scale(results.metric, [value for arm in scored for value in arm.extent])
    panels = list(dict.fromkeys(tuple(arm.values[axis] for axis in others[1:]) for arm in scored))
    for panel in panels:
        inside = [arm for arm in comparison.arms if tuple(arm.values[axis] for axis in others[1:]) == panel]
        if len(panels) > 1 and sum(bool(arm.scores) for arm in inside) < 2:
            continue  # one mark alone compares nothing
        title = ", ".join(f"{results.short[axis]} = {text}" for axis, text in zip(others[1:], panel, strict=True))
        yield _metric_panel(results, inside, x, others[:1], y, title)


def _metric_panel(results: SweepResults, arms: list[Arm], x: str, by: list[str], y: svg.Axis, panel: str) -> Figure:
    labels, name = results.axes[x], results.short[x]
    numbers = [number for text in labels if (number := as_number(text)) is not None]
    numeric = len(numbers) == len(labels)
    x_values = numbers if numeric else [float(index) for index in range(len(labels))]
    labelled = list(zip(labels, x_values, strict=True))
    groups = _groups(results, arms, by)
    series = [
        svg.Series(group.name, [_point(group.arms, x, text, x_value) for text, x_value in labelled], group.colour)
        for group in groups
    ]
    title = f"{results.metric} against {name}" + (f" ({panel})" if panel else "")
    drawing = svg.chart(series, _x_axis(name, labels, x_values, numeric), y, joined=numeric, description=title)
    spread = "Large: mean over seeds; small: each seed; bars: one standard deviation; "
    caption = f"{spread if any(arm.std is not None for arm in arms) else ''}{_seeds(arms)}."
    missing = sum(arm.mean is None for arm in arms)
    if missing:
        caption += f" {missing} of {len(arms)} rows {'has' if missing == 1 else 'have'} no completed trial."
    return Figure(title, caption, drawing, [_legend(groups)])


def _against_bits(comparison: Comparison) -> Iterator[Figure]:
    results = comparison.results
    by = [axis for axis in results.axes if axis.split(".")[0] == "quantization"][:1]
    scored = [arm for arm in comparison.contenders if arm.means.get(BITS)]
    if not by or len({arm.means.get(BITS) for arm in scored}) < 2:
        return
    labels = sorted({_bits(arm) for arm in scored}, key=float)
    others = [axis for axis, texts in results.axes.items() if axis != by[0] and 1 < len(texts) <= svg.SHAPES]
    second = next(iter(others), None)
    groups = _groups(results, scored, by)
    series = [
        svg.Series(group.name, [_mark(arm, labels.index(_bits(arm)), second) for arm in group.arms], group.colour)
        for group in groups
    ]
    x = svg.places("bits per parameter of the quantized layers (in order, not to scale)", labels)
    y = svg.scale(results.metric, [value for arm in scored for value in arm.extent])
    title = "Quality against bits per parameter"
    caption = f"One mark per row; left and {results.better} is better; {_seeds(scored)}."
    legends = [svg.legend([(group.name, group.colour) for group in groups], round_marks=second is not None)]
    legends += [svg.shape_legend(_named(results, second))] if second else []
    yield Figure(title, caption, svg.chart(series, x, y, joined=False, description=title), legends)


def _bits(arm: Arm) -> str:
    return f"{arm.means.get(BITS):.4g}"


def _curves(comparison: Comparison) -> Iterator[Figure]:
    """Training loss (raw and smoothed) and the validation metric, one line per run."""
    results = comparison.results
    x, others = axis_roles(results)
    second = x if others else None
    styles = dict(zip(results.axes[second], _styles(len(results.axes[second])), strict=True)) if second else {}
    groups = _groups(results, comparison.arms, others[:1] or ([x] if x else []))
    runs = [
        (trial, group.colour, styles.get(arm.values.get(second or "", ""), ""), trial.curves())
        for group in groups
        for arm in group.arms
        for trial in arm.trials
    ]
    logged = {colour for _, colour, _, rows in runs if rows}
    legends = [_legend([group for group in groups if group.colour in logged])]
    legends += [svg.line_legend(list(zip(_named(results, second), styles.values(), strict=True)))] if second else []
    for metric, smooth in (("train/loss", SMOOTH), (results.metric, 0.0)):
        curves = [_curve(results, trial, colour, style, rows, metric) for trial, colour, style, rows in runs]
        curves = [curve for curve in curves if curve.rows]
        if curves and (smooth or any(len(curve.rows) > 1 for curve in curves)):
            yield _curve_figure(results, curves, metric, smooth, legends)


def _curve_figure(
    results: SweepResults, curves: list[svg.Curve], metric: str, smooth: float, legends: list[list[svg.LegendEntry]]
) -> Figure:
    values = [value for curve in curves for _, value in curve.rows]
    y = svg.scale(metric, _without_spikes(values))
    legend = f"faint: as logged; line: exponential mean ({smooth:g})" if smooth else "as logged"
    caption = f"One line per run, {len(curves)} of {len(results.trials)} runs; {legend}"
    caption += "; cross: not completed" if any(curve.broken for curve in curves) else ""
    outside = sum(not y.low <= value <= y.high for value in values)
    beyond = "1 value beyond the axis touches" if outside == 1 else f"{outside} values beyond the axis touch"
    caption += f"; {beyond} its edge." if outside else "."
    x = svg.steps("optimizer step", [step for curve in curves for step, _ in curve.rows])
    title = f"{metric} by step"
    return Figure(title, caption, svg.line_plot(curves, x, y, smooth, title), legends)


def _curve(
    results: SweepResults, trial: TrialResult, colour: int, style: str, rows: list[Json], metric: str
) -> svg.Curve:
    pairs = [
        (float(row["step"]), float(value))
        for row in rows
        if is_number(value := row.get(metric)) and math.isfinite(value)
    ]
    name = results.describe(trial) + ("" if trial.ok else f" ({trial.status})")
    return svg.Curve(name, pairs, colour, not trial.ok, style)


def _styles(count: int) -> list[str]:
    """One look of a line for each value: dashes while they can be told apart, else shades."""
    if count <= len(svg.DASHES):
        return list(svg.DASHES[:count])
    return [f"stroke-opacity:{0.25 + 0.75 * index / (count - 1):.2f}" for index in range(count)]


def _x_axis(name: str, labels: list[str], values: list[float], numeric: bool) -> svg.Axis:
    if not numeric:
        return svg.places(name, labels)
    if min(values) > 0 and max(values) / min(values) >= 4:
        return svg.powers(name, values)
    return replace(svg.scale(name, values), ticks=[(value, f"{value:g}") for value in sorted(set(values))])


def _groups(results: SweepResults, arms: Sequence[Arm], by: list[str]) -> list[Group]:
    """The arms in groups by their value on the axis ``by[0]``; one group of all where ``by`` is empty."""
    if not by:
        return [Group(results.metric, 0, list(arms))]
    labels = [*results.axes[by[0]], UNKNOWN]
    arms_of_label = [[arm for arm in arms if arm.values[by[0]] == text] for text in labels]
    names = [f"{results.short[by[0]]} = {text}" if _is_bare(text) else text for text in labels]
    return [Group(names[index], index, members) for index, members in enumerate(arms_of_label) if members]


def _is_bare(text: str) -> bool:
    """True if a label means nothing without the name of its axis."""
    return as_number(text) is not None or text in ("true", "false", "null")


def _named(results: SweepResults, axis: str) -> list[str]:
    return [f"{results.short[axis]} = {text}" for text in results.axes[axis]]


def _point(arms: Sequence[Arm], x: str, text: str, x_value: float) -> svg.Point | None:
    """The completed arm at a place; None where there is none, or more than one without an axis between."""
    scored = [arm for arm in arms if arm.values[x] == text and arm.scores]
    return _mark(scored[0], x_value) if len(scored) == 1 else None


def _mark(arm: Arm, x: float, axis: str | None = None) -> svg.Point:
    """The mark of an arm with a score; on ``axis`` its place gives the shape."""
    labels = arm.results.axes[axis] if axis else []
    shape = labels.index(arm.values[axis]) if axis and arm.values[axis] in labels else None
    mean = arm.mean or 0.0
    tip = f"{arm.name}: {score_text(arm)}, n = {arm.n}"
    return svg.Point(x, mean, arm.scores if arm.n > 1 else [mean], arm.std, tip, shape)


def _legend(groups: Sequence[Group]) -> list[svg.LegendEntry]:
    return svg.legend([(group.name, group.colour) for group in groups]) if len(groups) > 1 else []


def _without_spikes(values: Sequence[float]) -> list[float]:
    """The range of the middle 98%, so that one spike does not flatten every curve; spikes touch the edge."""
    ordered = sorted(values)
    cut = len(ordered) // 100
    return ordered[cut : len(ordered) - cut]


def _seeds(arms: Sequence[Arm]) -> str:
    counts = sorted({arm.n for arm in arms if arm.scores})
    if not counts:
        return "no completed seed"
    if counts == [1]:
        return "n = 1 seed"
    return f"n = {counts[0]} seeds" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]} seeds"

"""The figures of a comparison: the metric against the axes, paired differences, quality against bits, curves."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from loralab.analysis.arms import Arm, Comparison
from loralab.analysis.paired import LEVEL
from loralab.analysis.results import SweepResults
from loralab.analysis.values import UNKNOWN, Json, as_number
from loralab.reporting import charts, curves, differences, explorer, forgetting, heat, search, tuning
from loralab.reporting.charts import Figure, Legend
from loralab.reporting.labels import spoken
from loralab.reporting.table import score_text

if TYPE_CHECKING:
    import altair as alt

BITS = "base.bits_per_parameter"
MOST_PANELS = 12
MOST_DASHES = 12
MOST_SEEDS = 1000  # drawn one by one
BAR = f"bars: the {LEVEL:.0%} interval of the paired difference to the row that each is held against, about the mean"


def figures(comparison: Comparison, number: int = 0) -> list[Figure]:
    """In the order of the page; a figure that has nothing to show is left out. ``number``: which table of the page."""
    results = comparison.results
    if results.searched:
        return _of_search(comparison, number)
    x, others = axis_roles(results)
    second = x if others and x and len(results.axes[x]) <= MOST_DASHES else None
    groups = grouped(results, comparison.arms, others[:1] or ([x] if x else []))
    names = named(results, second) if second else [""]
    lines = curves.figures(comparison, groups, second, names)
    rates = tuning.figures(comparison, groups, second, names)
    any_other = explorer.figures(comparison, groups, number)
    forgotten = forgetting.figures(comparison, groups)
    scores = [*_metric(comparison), *heat.figures(comparison), *differences.figures(comparison)]
    return [*rates, *scores, *_against_bits(comparison), *forgotten, *lines, *any_other]


def _of_search(comparison: Comparison, number: int) -> list[Figure]:
    """Of points that compare nothing with each other; coloured by the first searched axis of few values."""
    results = comparison.results
    few = [axis for axis in results.searched if 1 < len(results.axes[axis]) <= MOST_DASHES]
    groups = grouped(results, comparison.arms, few[:1])
    found = [*search.figures(comparison), *_against_bits(comparison), *forgetting.figures(comparison, groups)]
    return [*found, *curves.figures(comparison, groups, None, [""]), *explorer.figures(comparison, groups, number)]


def axis_roles(results: SweepResults) -> tuple[str | None, list[str]]:
    """The x axis, numeric if any is, and the other axes that vary, which become series and then panels; one that moves
    with another is neither."""
    moving = [axis for axis, labels in results.axes.items() if len(labels) > 1 and axis not in results.led]
    numeric = [axis for axis in moving if all(as_number(text) is not None for text in results.axes[axis])]
    x = next(iter([*numeric, *moving]), None)
    return x, [axis for axis in moving if axis != x]


def grouped(results: SweepResults, arms: Sequence[Arm], by: Sequence[str]) -> dict[str, list[Arm]]:
    """The arms by their value on the axis ``by[0]``, as a legend names it, numbers in order; all in one group where
    ``by`` is empty."""
    if not by:
        return {results.metric: list(arms)}
    by_label: dict[str, list[Arm]] = {}
    for arm in arms:
        by_label.setdefault(arm.values[by[0]], []).append(arm)
    labels = [text for text in in_order([*results.axes[by[0]], UNKNOWN]) if text in by_label]
    return {spoken(results, by[0], text): by_label[text] for text in labels}


def named(results: SweepResults, axis: str) -> list[str]:
    """``r = 8`` for each value of an axis, as its labels are listed."""
    return [f"{results.short[axis]} = {text}" for text in results.axes[axis]]


def in_order(labels: Sequence[str]) -> list[str]:
    """By size where all but the unknown are numbers; else as they are listed."""
    numbers = {text: as_number(text) for text in labels if text != UNKNOWN}
    if None in numbers.values():
        return [*labels]
    return sorted(labels, key=lambda text: numbers.get(text) or 0.0 if text in numbers else math.inf)


def _metric(comparison: Comparison) -> Iterator[Figure]:
    results, scored = comparison.results, comparison.contenders
    x, others = axis_roles(results)
    if x is None or not scored:
        return
    panels = list(dict.fromkeys(tuple(arm.values[axis] for axis in others[1:]) for arm in scored))
    shown = 0
    for panel in panels:
        inside = [arm for arm in comparison.arms if tuple(arm.values[axis] for axis in others[1:]) == panel]
        if len(panels) > 1 and sum(bool(arm.scores) for arm in inside) < 2:
            continue  # one mark alone compares nothing
        shown += 1
        if shown > MOST_PANELS:
            return
        title = ", ".join(f"{results.short[axis]} = {text}" for axis, text in zip(others[1:], panel, strict=True))
        yield _metric_panel(comparison, inside, x, others[:1], title, shown)


def _metric_panel(comparison: Comparison, arms: list[Arm], x: str, by: list[str], panel: str, number: int) -> Figure:
    results, scored = comparison.results, comparison.contenders
    labels, name = results.axes[x], results.together(x)
    numbers = [value for text in labels if (value := as_number(text)) is not None]
    is_numeric = len(numbers) == len(labels)
    groups = grouped(results, arms, by)
    means = [
        _mean(members, x, text, value, group)
        for group, members in groups.items()
        for text, value in (
            sorted(zip(labels, numbers, strict=True), key=lambda one: one[1])
            if is_numeric
            else zip(labels, labels, strict=True)
        )
    ]
    seeds = [
        {"x": row["x"], "value": value, "group": row["group"], "name": row["name"]}
        for row, arm in means
        if arm and arm.n > 1
        for value in arm.scores
    ]
    seeds = seeds if len(seeds) <= MOST_SEEDS else []
    rows = {"means": [row for row, _ in means if is_numeric or row["value"] is not None], "seeds": seeds}
    ends = [end for arm in scored for end in arm.extent]
    place = charts.x_number("x", name, numbers) if is_numeric else None
    chart = _marks(
        list(groups), results.metric, charts.without_spikes(ends) if len(ends) < 100 else None, place, labels, name
    )
    title = f"{results.metric} against {name}" + (f" ({panel})" if panel else "")
    legends = [Legend("group", "both", list(groups))] if len(groups) > 1 else []
    stem = f"metric_{number}" if number > 1 else "metric"
    return Figure(stem, title, _caption(arms), charts.specification(chart, rows), legends, "y")


def _mean(arms: Sequence[Arm], x: str, text: str, value: float | str, group: str) -> tuple[Json, Arm | None]:
    """The mark of the completed arm at a place, without a value where there is none, or more than one without an axis
    between them."""
    scored = [arm for arm in arms if arm.values[x] == text and arm.scores]
    arm = scored[0] if len(scored) == 1 else None
    return (
        ({"x": value, "group": group, "value": None, "name": ""}, None)
        if arm is None
        else (
            {"x": value, "group": group, **mark(arm)},
            arm,
        )
    )


def mark(arm: Arm) -> Json:
    """An arm's mean, the ends of its interval, and what is said of it when it is pointed at."""
    reach, difference = arm.reach, arm.difference
    ends = {} if reach is None or arm.mean is None else {"low": arm.mean - reach, "high": arm.mean + reach}
    told = f"{difference.text} against {arm.against.name}" if difference and arm.against else ""
    return {"name": arm.name, "value": arm.mean, **ends, "score": f"{score_text(arm)}, n = {arm.n}", "versus": told}


def hints(metric: str) -> list["alt.Tooltip"]:
    import altair as alt

    score, versus = alt.Tooltip("score:N", title=metric), alt.Tooltip("versus:N", title="paired difference")
    return [alt.Tooltip("name:N", title="row"), score, versus]


def _marks(
    groups: Sequence[str],
    metric: str,
    domain: Sequence[float] | None,
    place: "alt.X | None",
    labels: Sequence[str],
    title: str,
    beside: bool = True,
) -> "alt.LayerChart":
    """Means joined by lines over numbers, over names side by side where ``beside``; intervals, each seed as a ring."""
    import altair as alt

    y = charts.y_number("value", metric, domain)
    # keyword arguments of all layers: names stand side by side over their place
    where = (
        {"x": place}
        if place
        else {
            "x": alt.X(
                "x:N",
                title=title,
                sort=list(labels),
                axis=alt.Axis(labelAngle=0 if sum(map(len, labels)) < 60 else -40),
            ),
            **({"xOffset": alt.XOffset("group:N", scale=alt.Scale(domain=list(groups)))} if beside else {}),
        }
    )
    means, seeds = (
        alt.Chart(alt.NamedData(name)).encode(color=charts.colour(groups), **where) for name in ("means", "seeds")
    )
    bars = means.mark_rule(strokeWidth=1.6).encode(y=charts.y_number("low", metric, domain), y2="high:Q")
    size = alt.Size("group:O", scale=charts.nested(groups, 150, 60), legend=None)
    marks = means.mark_point(filled=True, opacity=1, stroke="white", strokeWidth=1)
    marks = marks.encode(y=y, size=size, shape=charts.shape(groups, "group"), tooltip=hints(metric))
    rings = seeds.mark_point(filled=False, size=26, opacity=0.6).encode(
        y=y, tooltip=[alt.Tooltip("name:N", title="a seed of"), alt.Tooltip("value:Q", title=metric, format=".6~g")]
    )
    width = alt.StrokeWidth("group:O", scale=charts.nested(groups, 5, 1.4), legend=None)
    lines = [means.mark_line().encode(y=y, strokeWidth=width)] if place else []
    layers = [*lines, bars, rings, marks]
    layers[0] = layers[0].add_params(charts.zoom(("x", "y") if place else ("y",)))
    return charts.layers(*layers)


def _against_bits(comparison: Comparison) -> Iterator[Figure]:
    """A place for each number of bits, in order; they lie too unevenly for a scale."""
    results = comparison.results
    by = [axis for axis in results.axes if axis.split(".")[0] == "quantization"][:1]
    scored = [arm for arm in comparison.contenders if arm.means.get(BITS)]
    if not by or len({arm.means.get(BITS) for arm in scored}) < 2:
        return
    groups = grouped(results, scored, by)
    labels = sorted({_bits(arm) for arm in scored}, key=float)
    rows = [{"x": _bits(arm), "group": group, **mark(arm)} for group, members in groups.items() for arm in members]
    seeds = [
        {"x": _bits(arm), "value": value, "group": group, "name": arm.name}
        for group, members in groups.items()
        for arm in members
        if arm.n > 1
        for value in arm.scores
    ]
    seeds = seeds if len(seeds) <= MOST_SEEDS else []
    title = "bits per parameter of the quantized layers (in order, not to scale)"
    beside = len({(row["x"], row["group"]) for row in rows}) > len(labels)
    chart = _marks(list(groups), results.metric, None, None, labels, title, beside)
    caption = f"One mark per row; left and {results.better} is better; {BAR}; {differences.seeds_words(scored)}."
    legends = [Legend("group", "both", list(groups))]
    spec = charts.specification(chart, {"means": rows, "seeds": seeds})
    yield Figure("quality_against_bits", "Quality against bits per parameter", caption, spec, legends, "y")


def _bits(arm: Arm) -> str:
    return f"{arm.means.get(BITS):.4g}"


def _caption(arms: Sequence[Arm]) -> str:
    several = any(arm.n > 1 for arm in arms) and sum(len(arm.scores) for arm in arms) <= MOST_SEEDS
    bars = f"{BAR}; " if any(arm.reach is not None for arm in arms) else ""
    caption = f"{'Large: mean over seeds; small: each seed; ' if several else ''}{bars}{differences.seeds_words(arms)}."
    missing = sum(arm.mean is None for arm in arms)
    if missing:
        caption += f" {missing} of {len(arms)} rows {'has' if missing == 1 else 'have'} no completed trial."
    return caption

"""Any quantity of the rows, or of the trials, against any other, with the front that nothing beats in both."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from loralab.analysis.arms import Arm, Comparison
from loralab.analysis.values import Json, as_number
from loralab.reporting import charts
from loralab.reporting.charts import Figure, Legend, rounded
from loralab.reporting.trials import average, constant, quantities

MANY = 500  # rows, above which their numbers have six digits

if TYPE_CHECKING:
    import altair as alt

FIRST = (  # the x axis is the first of these that differs between rows
    *("base.bits_per_parameter", "memory.alone_peak_bytes", "memory.measured_peak_bytes"),
    *("adapter.trainable_parameters", "time.train_s", "time.tokens_per_s"),
)


def figures(comparison: Comparison, groups: Mapping[str, Sequence[Arm]], number: int) -> Iterator[Figure]:
    """The explorer of a table; ``number``: which table of the page. None where fewer than two rows have a score."""
    results = comparison.results
    if len(comparison.contenders) < 2:
        return
    about = quantities(results)
    group_of = {id(arm): group for group, arms in groups.items() for arm in arms}
    arms = comparison.contenders
    means = {name: [_value(arm, name, one) for arm in arms] for name, one in about.items()}
    stored = {
        name: constant([rounded(one) for one in column] if len(arms) > MANY else column)
        for name, column in means.items()
    }
    known = [name for name in FIRST if len({value for value in means.get(name, []) if value is not None}) > 1]
    x = next(iter(known), next((name for name in about if name != results.metric), None))
    if x is None or results.metric not in about:
        return
    rows = [
        {
            "name": arm.name,
            "group": group_of.get(id(arm), "?"),
            "x": _shown(means[x][at], about[x]),
            "y": means[results.metric][at],
        }
        for at, arm in enumerate(arms)
    ]
    rows = [row for row in rows if row["x"] is not None and row["y"] is not None]
    store = {
        "set": number,
        "quantities": about,
        "x": x,
        "y": results.metric,
        "means": {
            "name": [arm.name for arm in arms],
            "group": [group_of.get(id(arm), "?") for arm in arms],
            "values": stored,
        },
        "groups": {arm.name: group_of.get(id(arm), "?") for arm in comparison.arms},
    }
    spec = charts.specification(
        _chart(list(groups), about[x]["title"], about[results.metric]["title"]),
        {"points": rows, "front": _front(rows, about[x]["better"], about[results.metric]["better"])},
    )
    legends = [Legend("group", "both", list(groups))] if len(groups) > 1 else []
    caption = (
        "One mark per row, means over its completed seeds; the line joins the rows that no other beats in both. What a "
        "pack measured is of all its trials at once, so time and measured memory are of trials that ran alone."
    )
    yield Figure("explorer", "Any quantity against any other", caption, spec, legends, "xy", "explore", store)


def _value(arm: Arm, name: str, about: Json) -> float | None:
    if name in arm.values:
        return as_number(arm.values[name])
    if name == "memory.alone_peak_bytes":
        return arm.alone_peak
    return arm.mean if name == arm.results.metric else average(arm.ok, name, about)


def _shown(value: float | None, about: Json) -> float | None:
    return None if value is None else value / about["divisor"]


def _front(rows: Sequence[Json], better_x: str | None, better_y: str | None) -> list[Json]:
    """The rows that no other beats in both, from the best in x on; empty where neither way is better on an axis."""
    if better_x is None or better_y is None:
        return []
    sign_x, sign_y = (1 if better == "lower" else -1 for better in (better_x, better_y))
    front: list[Json] = []
    for row in sorted(rows, key=lambda row: (sign_x * row["x"], sign_y * row["y"])):
        if not front or sign_y * row["y"] < sign_y * front[-1]["y"]:
            front.append(row)
    return front


def _chart(groups: Sequence[str], x_title: str, y_title: str) -> "alt.LayerChart":
    import altair as alt

    x = alt.X("x:Q", title=x_title, scale=alt.Scale(zero=False, padding=12), axis=alt.Axis(tickCount=6))
    y = alt.Y("y:Q", title=y_title, scale=alt.Scale(zero=False, padding=12), axis=alt.Axis(tickCount=6))
    hint = [
        alt.Tooltip("name:N", title="row"),
        alt.Tooltip("x:Q", title=x_title, format=".6~g"),
        alt.Tooltip("y:Q", title=y_title, format=".6~g"),
    ]
    front = alt.Chart(alt.NamedData("front")).mark_line(color="#5c6570", strokeDash=[4, 3], interpolate="step-after")
    points = alt.Chart(alt.NamedData("points")).mark_point(filled=True, opacity=0.9, stroke="white", strokeWidth=1)
    size = alt.Size("group:O", scale=charts.nested(groups, 130, 60), legend=None)
    points = points.encode(
        x=x, y=y, color=charts.colour(groups), shape=charts.shape(groups, "group"), size=size, tooltip=hint
    )
    return charts.layers(front.encode(x=x, y=y, order="x:Q"), points.add_params(charts.zoom()))

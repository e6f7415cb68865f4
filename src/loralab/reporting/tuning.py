"""The validation metric of every arm against what is tuned: a line an arm, its chosen value marked."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from loralab.analysis.arms import Arm, Comparison
from loralab.analysis.tuning import Tuned
from loralab.analysis.values import Json, as_number
from loralab.numerics.tuning import Choice, Setting
from loralab.reporting import charts
from loralab.reporting.charts import Figure, Legend

if TYPE_CHECKING:
    import altair as alt

WORST = 3.0  # of the way from the best mean to the median one, beyond which a line leaves the chart


def figures(
    comparison: Comparison, groups: Mapping[str, Sequence[Arm]], by: str | None, names_by: Sequence[str]
) -> Iterator[Figure]:
    """One figure for each tuned axis of numbers; none where nothing is tuned. ``by``: the axis whose value gives a
    line's dash, called ``names_by``; ``groups`` give the colours."""
    tuned = comparison.tuned
    if tuned is None:
        return
    dashes = dict(zip(comparison.results.axes[by], names_by, strict=True)) if by else {}
    for place, name in enumerate(tuned.names):
        rows: dict[str, list[Json]] = {"means": [], "seeds": []}
        for group, arms in groups.items():
            for arm in arms:
                about = {"group": group, "by": dashes.get(arm.values[by], "") if by else "", "name": arm.name}
                for kind, found in _points(tuned, arm, place).items():
                    rows[kind] += [{**about, **one} for one in found]
        numbers = [row["x"] for row in rows["means"]]
        if len(set(numbers)) < 2:
            continue
        spec = charts.specification(_chart(tuned, name, list(groups), list(dashes.values()), rows), rows)
        legends = [Legend("group", "colour", list(groups)), Legend("by", "dash", list(dashes.values()))]
        caption = (
            f"Means over seeds of {tuned.whole.metric}, by which each row's {name} is chosen (large mark); every seed"
            " as a ring; the table's scores are of the test split. Lines that leave the chart are worse still."
        )
        stem = "tuning" if not place else f"tuning_{place + 1}"
        shown = [legend for legend in legends if len(legend.names) > 1]
        yield Figure(stem, f"{tuned.whole.metric} against {name}", caption, spec, shown, "x")


def _points(tuned: Tuned, arm: Arm, place: int) -> dict[str, list[Json]]:
    """Of an arm, the settings that have the chosen values on the other tuned axes."""
    key = tuple(arm.values[axis] for axis in tuned.results.axes)
    choice, scores = tuned.choices[key], tuned.scores[key]
    means, seeds = [], []
    for setting in sorted((one for one in scores if as_number(one[place]) is not None), key=lambda s: float(s[place])):
        values = {seed: value for seed, value in scores[setting].items() if value is not None}
        if not values or not _beside(setting, choice, place):
            continue
        mean, x = statistics.fmean(values.values()), float(setting[place])
        told = f"{mean:.4f}, n = {len(values)}"
        means.append({"x": x, "value": mean, "score": told, "chosen": setting == choice.setting})
        seeds += [{"x": x, "value": value} for value in values.values() if len(values) > 1]
    return {"means": means, "seeds": seeds}


def _beside(setting: Setting, choice: Choice, place: int) -> bool:
    """Whether ``setting`` is the chosen one but for its value at ``place``."""
    own = choice.setting
    return own is not None and all(setting[i] == own[i] for i in range(len(own)) if i != place)


def _chart(
    tuned: Tuned, name: str, groups: list[str], dashes: list[str], rows: Mapping[str, Sequence[Json]]
) -> "alt.LayerChart":
    import altair as alt

    metric, values = tuned.whole.metric, [row["value"] for row in rows["means"]]
    sign = 1 if tuned.whole.mode == "min" else -1
    best, middle = min(values, key=lambda value: sign * value), statistics.median(values)
    ends = [best, best + WORST * (middle - best)] if middle != best else [min(values), max(values)]
    margin = 0.06 * abs(ends[1] - ends[0]) or 0.01
    domain = [min(ends) - margin, max(ends) + margin]
    x = charts.x_number("x", name, [row["x"] for row in rows["means"]])
    y, colour = charts.y_number("value", metric, domain), charts.colour(groups)
    means = alt.Chart(alt.NamedData("means")).encode(x=x, y=y, color=colour)
    hint = [
        alt.Tooltip("name:N", title="row"),
        alt.Tooltip("x:Q", title=name, format=".6~g"),
        alt.Tooltip("score:N", title=metric),
    ]
    lines = means.mark_line(clip=True, strokeWidth=2).encode(detail="name:N", strokeDash=charts.dash(dashes or [""]))
    size = alt.Size("chosen:O", scale=alt.Scale(domain=[False, True], range=[24, 150]), legend=None)
    marks = means.mark_point(filled=True, opacity=1, stroke="white", strokeWidth=1, clip=True)
    rings = alt.Chart(alt.NamedData("seeds")).mark_point(filled=False, size=22, opacity=0.5, clip=True)
    layered = [lines.add_params(charts.zoom()), rings.encode(x=x, y=y, color=colour)]
    return charts.layers(*layered, marks.encode(size=size, tooltip=hint))

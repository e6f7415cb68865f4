"""Learning against forgetting: each row's metric, and how far its loss on data.forgetting is above that of its base.

The chart is that of "LoRA Learns Less and Forgets Less" (arXiv 2405.09673).
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from loralab.analysis.arms import Arm, Comparison
from loralab.analysis.values import Json
from loralab.data.base import FORGETTING
from loralab.reporting import charts
from loralab.reporting.charts import Figure, Legend

if TYPE_CHECKING:
    import altair as alt

INCREASE = f"{FORGETTING}/increase"
Point = tuple[float, float]  # metric, increase


def figures(comparison: Comparison, groups: Mapping[str, Sequence[Arm]]) -> Iterator[Figure]:
    """One figure for each data set of which records have scores, compared nowhere else; ``groups`` give the colours."""
    trials = [trial for arm in comparison.arms for trial in arm.ok if trial.score(INCREASE) is not None]
    names = {trial.get("data.forgetting.targets"): str(trial.get("data.forgetting.name")) for trial in trials}
    for number, (targets, name) in enumerate(names.items(), 1):
        rows: dict[str, list[Json]] = {"means": [], "seeds": [], "zero": [{"zero": 0}]}
        for group, arms in groups.items():
            for arm in arms:
                points, about = _points(comparison, arm, targets), {"group": group, "name": arm.name}
                rows["means"] += [{**about, **_mean(points)}] if points else []
                rows["seeds"] += [{**about, "x": x, "y": y} for x, y in points if len(points) > 1]
        if not rows["means"]:
            continue
        spec = charts.specification(_chart(comparison, list(groups), rows), rows)
        legends = [Legend("group", "both", list(groups))] if len(groups) > 1 else []
        counts = sorted({row["n"] for row in rows["means"]})
        caption = (
            f"One mark per row, its mean over seeds; every seed as a ring. Upwards: how far the loss on {name}, which"
            " no row was trained on, has risen above that of the row's base without an adapter; at 0 nothing is"
            " forgotten, and lower is better."
            f" {'Left' if comparison.results.mode == 'min' else 'Right'}: better {comparison.results.metric}."
            f" n = {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} seed{'s' * (counts[-1] > 1)}."
        )
        title = "Learning against forgetting" + (f" ({name})" if len(names) > 1 else "")
        yield Figure(f"forgetting_{number}" if number > 1 else "forgetting", title, caption, spec, legends)


def _points(comparison: Comparison, arm: Arm, targets: str | None) -> list[Point]:
    """(metric, increase) of the arm's completed seeds on that data set."""
    own = [trial for trial in arm.ok if trial.get("data.forgetting.targets") == targets]
    found = [(trial.score(comparison.results.metric), trial.score(INCREASE)) for trial in own]
    return [(x, y) for x, y in found if x is not None and y is not None]


def _mean(points: Sequence[Point]) -> Json:
    x, y = (statistics.fmean(values) for values in zip(*points, strict=True))
    return {"x": x, "y": y, "n": len(points)}


def _chart(comparison: Comparison, groups: list[str], rows: Mapping[str, Sequence[Json]]) -> "alt.LayerChart":
    import altair as alt

    metric, title = comparison.results.metric, f"{INCREASE} (nats per token)"
    means, seeds = (
        alt.Chart(alt.NamedData(kind)).encode(
            x=alt.X("x:Q", title=metric, scale=alt.Scale(zero=False)),
            y=charts.y_number("y", title),
            color=charts.colour(groups),
            tooltip=[
                alt.Tooltip("name:N", title=who),
                alt.Tooltip("x:Q", title=metric, format=".6~g"),
                alt.Tooltip("y:Q", title=INCREASE, format=".6~g"),
            ],
        )
        for kind, who in (("means", "row"), ("seeds", "a seed of"))
    )
    zero = alt.Chart(alt.NamedData("zero")).mark_rule(strokeDash=[4, 3], color="#5c6570").encode(y="zero:Q")
    marks = means.mark_point(filled=True, opacity=1, size=110, stroke="white", strokeWidth=1)
    marks = marks.encode(shape=charts.shape(groups, "group"))
    rings = seeds.mark_point(filled=False, size=26, opacity=0.6)
    return charts.layers(zero, rings.add_params(charts.zoom()), marks)

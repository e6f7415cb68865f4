"""Paired differences: a row for each, with its interval."""

from collections.abc import Iterator, Sequence

from loralab.analysis.arms import Arm, Comparison
from loralab.analysis.paired import LEVEL, Difference
from loralab.analysis.values import Json
from loralab.reporting import charts
from loralab.reporting.charts import Figure, Legend
from loralab.reporting.labels import height, row_axis, row_labels
from loralab.reporting.table import level_text

MOST_ROWS = 60
VERDICTS = ["better", "worse", "not told apart"]
LEGEND = Legend("verdict", "fixed", VERDICTS)


def figures(comparison: Comparison) -> Iterator[Figure]:
    """A row for each arm that is held against another, with the interval of the paired difference."""
    results = comparison.results
    arms = [arm for arm in comparison.arms if arm.difference and arm.difference.interval]
    if not arms:
        return
    labels = row_labels(arms[:MOST_ROWS])
    rows = [
        {**row(arm.difference, arm.name, arm.against.name if arm.against else "", results.mode), "label": label}
        for arm in arms[:MOST_ROWS]
        for label in [labels[arm.name]]
        if arm.difference
    ]
    level = next(arm.difference.level for arm in arms if arm.difference)
    spec = drawn(rows, f"difference in {results.metric}; {results.better} is better")
    caption = (
        f"Mean paired difference over shared seeds with its {LEVEL:.0%} interval, each row against the one that "
        "differs from it in one axis alone, where there is one; better or worse: where 0 is excluded "
        f"{level_text(level)}; any other is no finding. "
        f"{seeds_words(arms)}.{left_out(len(arms))}"
    )
    yield Figure("differences", "Paired differences", caption, spec, [LEGEND])


def row(difference: Difference, name: str, against: str, mode: str) -> Json:
    """A difference that has an interval, as the chart draws it."""
    low, high = difference.interval or (difference.mean, difference.mean)
    told = {"value": difference.mean, "low": low, "high": high, "text": difference.text}
    verdict = difference.verdict(mode) or VERDICTS[2]
    return {"name": name, "against": against, "verdict": verdict, **told, "p": difference.p, "n": difference.n}


def drawn(rows: Sequence[Json], title: str) -> Json:
    """The specification of the chart; ``title``: of its axis; each row has the ``label`` that it is drawn with."""
    import altair as alt

    base = alt.Chart(alt.NamedData("rows")).encode(
        y=row_axis(),
        color=alt.Color(
            "verdict:N",
            scale=alt.Scale(domain=VERDICTS, range=["#00846a", "#d55e00", "#5f6670"]),
            legend=alt.Legend(title=None),
        ),
        tooltip=[
            alt.Tooltip("name:N", title="row"),
            alt.Tooltip("against:N"),
            alt.Tooltip("text:N", title="paired difference"),
            alt.Tooltip("p:Q", format=".3~g"),
            alt.Tooltip("n:Q"),
        ],
    )
    bars = base.mark_rule(strokeWidth=2.5).encode(x=alt.X("low:Q", title=title), x2="high:Q")
    points = base.mark_point(filled=True, size=80, opacity=1).encode(x=alt.X("value:Q", title=title))
    zero = alt.Chart(alt.NamedData("zero")).mark_rule(strokeDash=[4, 3], color="#5c6570").encode(x="zero:Q")
    return charts.specification(
        charts.layers(zero, bars.add_params(charts.zoom(("x",))), points),
        {"rows": rows, "zero": [{"zero": 0}]},
        height([row["label"] for row in rows]),
    )


def left_out(count: int) -> str:
    """A sentence where not all of ``count`` rows are drawn."""
    return f" The first {MOST_ROWS} of {count} rows." if count > MOST_ROWS else ""


def seeds_words(arms: Sequence[Arm]) -> str:
    counts = sorted({arm.n for arm in arms if arm.scores})
    if not counts:
        return "no completed seed"
    if counts == [1]:
        return "n = 1 seed"
    return f"n = {counts[0]} seeds" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]} seeds"

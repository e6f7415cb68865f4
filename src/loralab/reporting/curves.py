"""Training and validation curves: a line for each run, or an arm's mean and range where there are very many."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loralab.analysis import curves as analysis
from loralab.analysis.arms import Arm, Comparison
from loralab.analysis.trials import MISSING, TrialResult
from loralab.analysis.values import Json
from loralab.reporting import charts
from loralab.reporting.charts import Figure, Legend, rounded

if TYPE_CHECKING:
    import altair as alt

MOST_LINES = 200  # above, means and ranges stand for them
MOST_TOLD = 40  # lines, where there would be more than MOST_LINES means
MOST_VALUES = 20_000  # of all lines of a metric together
SMOOTH = (0.8, 0.95)
LOSS = "train/loss"


@dataclass(frozen=True)
class Run:
    """One trial's metrics.jsonl; ``group`` gives its line's colour, ``by`` its dash."""

    trial: TrialResult
    arm: Arm
    group: str
    by: str
    curves: analysis.Curves


def figures(
    comparison: Comparison, groups: Mapping[str, Sequence[Arm]], by: str | None, names_by: list[str]
) -> Iterator[Figure]:
    """The training loss and the validation metric, each of which the page can change for any other curve. ``by``: the
    axis whose value gives a line's dash, called ``names_by``; ``groups`` give the colours."""
    results = comparison.results
    dashes = dict(zip(results.axes[by], names_by, strict=True)) if by else {}
    shown, of_how_many = _spaced(groups, by)
    runs = [
        Run(trial, arm, group, dashes.get(arm.values[by], "?") if by else "", analysis.Curves.of(trial.curves()))
        for group, arms in shown.items()
        for arm in arms
        for trial in arm.trials
    ]
    runs = [run for run in runs if run.curves.counts]
    names = analysis.metrics([run.curves for run in runs], (LOSS, results.metric))
    most = MOST_LINES if len(shown) == of_how_many else MOST_TOLD
    store = {metric: _stored(comparison, runs, metric, most) for metric in names}
    store = {metric: stored for metric, stored in store.items() if stored["seeds"] or stored["means"]}
    logged = list(dict.fromkeys(run.group for run in runs))
    legends = [Legend("group", "colour", logged), Legend("by", "dash", [d for d in names_by if by])]
    legends = [legend for legend in legends if len(legend.names) > 1]
    for metric in (LOSS, results.metric):
        if metric in store and (metric == LOSS or _is_curve(store[metric])):
            figure = _figure(comparison, metric, store, legends, logged, names_by)
            chosen = f" Drawn are {len(shown)} of {of_how_many} values of the legend, evenly spaced among them."
            yield figure if len(shown) == of_how_many else replace(figure, caption=figure.caption + chosen)


def _spaced(groups: Mapping[str, Sequence[Arm]], by: str | None) -> tuple[Mapping[str, Sequence[Arm]], int]:
    """Of groups with more lines than a reader can tell apart, even as means, so many that about MOST_TOLD lines are
    left, the first and the last among them; and how many there are."""
    begun = [
        (group, arm) for group, arms in groups.items() for arm in arms if {t.status for t in arm.trials} - {MISSING}
    ]
    names = list(dict.fromkeys(group for group, _ in begun))
    lines = len({(group, arm.values[by] if by else "") for group, arm in begun})
    if lines <= MOST_LINES or len(names) < 3:
        return groups, len(groups)
    kept = min(len(names), max(2, MOST_TOLD * len(names) // lines))
    chosen = [names[place * (len(names) - 1) // (kept - 1)] for place in range(kept)]
    return {group: groups[group] for group in chosen}, len(names)


def rows(stored: Json, smooth: float | None) -> dict[str, list[Json]]:
    """The data sets of a chart, as the page's script makes them too: lines, raw (behind smoothed ones), bands, ends."""
    kind = "seeds" if stored["seeds"] else "means"
    made: dict[str, list[Json]] = {"lines": [], "raw": [], "bands": [], "ends": []}
    for line in stored[kind]:
        about = {key: line[key] for key in ("line", "group", "by")}
        smoothed = line.get("smooth", {}).get(str(smooth))
        made["lines"] += _points(about, smoothed or line)
        made["raw"] += _points(about, line) if smoothed else []
        made["bands"] += _points(about, line) if "low" in line else []
        made["ends"] += made["lines"][-1:] if line["broken"] else []
    return made


def chart(metric: str, groups: Sequence[str], dashes: Sequence[str], domain: Sequence[float]) -> "alt.LayerChart":
    """Lines over steps; faint ones as logged behind smoothed ones, a band for a range, a cross at a broken end."""
    import altair as alt

    x = alt.X("step:Q", title="optimizer step", axis=alt.Axis(tickMinStep=1, grid=False), scale=alt.Scale(nice=False))
    y, colour = charts.y_number("value", metric, domain), charts.colour(groups)
    hint = [
        alt.Tooltip("line:N", title="run"),
        alt.Tooltip("step:Q"),
        alt.Tooltip("value:Q", title=metric, format=".6~g"),
    ]
    hover = alt.selection_point(name="hover", on="pointerover", nearest=True, fields=["line", "step"], empty=False)
    width = alt.StrokeWidth("group:O", scale=charts.nested(groups, 5, 1.4), legend=None)

    def layer(name: str) -> "alt.Chart":
        return alt.Chart(alt.NamedData(name)).encode(x=x, y=y, color=colour, detail="line:N")

    bands = (
        layer("bands").mark_area(opacity=0.16, clip=True).encode(y=charts.y_number("low", metric, domain), y2="high:Q")
    )
    raw = layer("raw").mark_line(opacity=0.22, strokeWidth=1, clip=True)
    lines = layer("lines").mark_line(clip=True).encode(strokeDash=charts.dash(dashes), strokeWidth=width)
    ends = layer("ends").mark_point(shape="cross", filled=True, size=70, angle=45, clip=True)
    near = layer("lines").mark_point(filled=True, size=55, clip=True)
    near = near.encode(opacity=alt.condition(hover, alt.value(1), alt.value(0)), tooltip=hint).add_params(hover)
    return charts.layers(bands, raw, lines.add_params(charts.zoom()), ends, near)


def _figure(
    comparison: Comparison, metric: str, store: Json, legends: list[Legend], groups: list[str], dashes: list[str]
) -> Figure:
    stored, smooth = store[metric], SMOOTH[0] if metric == LOSS else None
    made = rows(stored, smooth)
    values = [point["value"] for name in ("lines", "raw") for point in made[name]]
    spec = charts.specification(chart(metric, groups, dashes, charts.without_spikes(values)), made)
    drawn = {"metrics": store, "metric": metric, "smooth": smooth}
    name = metric.replace("/", "_")
    return Figure(
        f"curve_{name}", f"{metric} by step", _caption(comparison, stored, metric), spec, legends, "y", "curves", drawn
    )


def _caption(comparison: Comparison, stored: Json, metric: str) -> str:
    runs, total = stored["runs"], len(comparison.results.trials)
    who = f"One line per run, {runs} of {total} runs"
    if not stored["seeds"]:
        of = "row" if stored["of"] == "arm" else "value of the legend"
        who = f"The mean and the range of each {of} stand for its runs, {runs} of {total} runs"
    smoothed = f"; faint: as logged; line: exponential mean ({SMOOTH[0]:g})" if metric == LOSS else "; as logged"
    broken = "; cross: not completed" if stored["broken"] else ""
    return f"{who}{smoothed}{broken}. At most {analysis.MOST_POINTS} points of a line, the extremes among them."


def _stored(comparison: Comparison, runs: Sequence[Run], metric: str, most: int) -> Json:
    """What the page draws a metric's curves from. ``seeds``: a line for each run, empty where there are more than
    ``most``; ``means``: a line with its range for each arm of several runs, where even those are more for each group.
    """
    series = [(run, points) for run in runs if (points := run.curves.series(metric))]
    few = len(series) <= most
    arms: dict[object, list[tuple[Run, list[tuple[float, float]]]]] = {}
    by_arm = len({id(run.arm) for run, _ in series}) <= most
    for run, points in series:
        arms.setdefault(id(run.arm) if by_arm else (run.group, run.by), []).append((run, points))
    limit = max(8, min(analysis.MOST_POINTS, MOST_VALUES // max(1, len(series) if few else len(arms))))
    levels = SMOOTH if metric.startswith("train/") else ()
    seeds = [_of_run(comparison, run, points, limit, levels) for run, points in (series if few else [])]
    means = [_of_runs(members, by_arm, limit, levels) for members in arms.values()]
    means = means if len(means) < len(series) else []
    broken = sum(not run.trial.ok for run, _ in series) if few else 0
    return {"seeds": seeds, "means": means, "runs": len(series), "of": "arm" if by_arm else "group", "broken": broken}


def _of_run(comparison: Comparison, run: Run, points: analysis.Rows, limit: int, levels: Sequence[float]) -> Json:
    name = comparison.results.describe(run.trial) + ("" if run.trial.ok else f" ({run.trial.status})")
    return line(name, (run.group, run.by), points, not run.trial.ok, limit, levels)


def _of_runs(members: Sequence[tuple[Run, analysis.Rows]], by_arm: bool, limit: int, levels: Sequence[float]) -> Json:
    run = members[0][0]
    name = run.arm.name if by_arm else ", ".join(filter(None, [run.group, run.by]))
    points = analysis.together([points for _, points in members])
    return line(f"{name}, mean of {len(members)}", (run.group, run.by), points, False, limit, levels)


def line(
    name: str,
    look: tuple[str, str],
    points: analysis.Rows,
    broken: bool,
    limit: int = analysis.MOST_POINTS,
    levels: Sequence[float] = (),
) -> Json:
    """A line of a store, thinned to ``limit`` points; ``look``: what its colour and its dash stand for; ``levels``: of
    the exponential means that it also has."""
    about = {"line": name, "group": look[0], "by": look[1], "broken": broken}
    smooth = {str(keep): _columns(analysis.thin(analysis.smoothed(points, keep), limit)) for keep in levels}
    return {
        **about,
        **_columns(analysis.thin(points, limit)),
        **({"smooth": smooth} if smooth and len(points) > 2 else {}),
    }


def _columns(points: analysis.Rows) -> Json:
    names = ("step", "value", "low", "high")[: len(points[0])]
    return {name: [rounded(point[at]) for point in points] for at, name in enumerate(names)}


def _points(about: Json, line: Json) -> list[Json]:
    names = [name for name in ("step", "value", "low", "high") if name in line]
    return [
        {**about, **dict(zip(names, point, strict=True))} for point in zip(*(line[name] for name in names), strict=True)
    ]


def _is_curve(stored: Json) -> bool:
    return any(len(line["step"]) > 1 for line in (*stored["seeds"], *stored["means"]))

"""The charts of ``make gpu``'s page: speed against trials a pass, planned against measured memory, memory by step."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from loralab.analysis.values import Json
from loralab.reporting import charts, curves
from loralab.reporting.charts import Figure, Legend

if TYPE_CHECKING:
    import altair as alt

PEFT, ALONE = "tokens/s, times PEFT + HF Trainer's", "tokens/s, times those of one trial a pass"
STEP, RESIDENT = "memory of the step (GiB)", "resident memory of the process (GiB)"


def speed(bases: Sequence[Json]) -> Iterator[Figure]:
    """A chart for each model: lines over the number of trials in one pass."""
    for model in dict.fromkeys(base["model"] for base in bases):
        own = [base for base in bases if base["model"] == model]
        sides = [(base, side) for base in own for side in base["sides"] if side.get("tokens_per_s")]
        with_peer = any(side.get("over_peft") for _, side in sides)
        key = "over_peft" if with_peer else "over_alone"
        rows = [
            {
                **{"group": f"{side['name']}, {base['quantization']}", "by": f"{base['length']} tokens a trial"},
                **{"trials": side["trials"], "value": charts.rounded(side[key])},
            }
            for base, side in sides
            if side.get(key)
        ]
        if rows:
            groups, dashes = (list(dict.fromkeys(row[name] for row in rows)) for name in ("group", "by"))
            spec = charts.specification(
                _speed_chart(PEFT if with_peer else ALONE, groups, dashes, rows), {"rows": rows}
            )
            legends = [Legend("group", "colour", groups), Legend("by", "dash", dashes)]
            legends = [legend for legend in legends if len(legend.names) > 1]
            name = f"speed_{model.replace(' ', '_')}"
            caption = f"{model}: all tokens of a pass in a second, over those of one trial of the peer."
            yield Figure(name, f"Trials in one pass, {model}", caption, spec, legends, "xy")


def _speed_chart(title: str, groups: Sequence[str], dashes: Sequence[str], rows: Sequence[Json]) -> "alt.LayerChart":
    import altair as alt

    base = alt.Chart(alt.NamedData("rows")).encode(
        x=charts.x_number("trials", "trials in one pass", [row["trials"] for row in rows]),
        y=charts.y_number("value", title),
        color=charts.colour(groups),
        tooltip=[alt.Tooltip(f"{name}:{kind}") for name, kind in (("group", "N"), ("by", "N"), ("trials", "Q"))]
        + [alt.Tooltip("value:Q", title=title, format=".3~g")],
    )
    lines = base.mark_line(strokeWidth=2).encode(strokeDash=charts.dash(dashes))
    return charts.layers(lines.add_params(charts.zoom()), base.mark_point(filled=True, size=70, opacity=1))


def ratios(runs: Sequence[Json]) -> Iterator[Figure]:
    """Predicted over measured peak of each run that has both."""
    runs = [run for run in runs if run.get("predicted_over_measured")]
    if not runs:
        return
    rows = [
        {
            "name": ", ".join(filter(None, (run["model"], run["quantization"], run["case"]))),
            "value": float(run["predicted_over_measured"]),
        }
        for run in runs
    ]
    chart = charts.by_name("predicted / measured peak", 1.0)
    spec = charts.specification(chart, {"rows": rows, "at": [{"at": 1}]}, charts.ROW * len(rows) + 10)
    caption = "Predicted over measured peak of torch's allocator; 1 is exact."
    yield Figure("peak_memory", "Peak memory", caption, spec)


def memory(arms: Sequence[Json]) -> Iterator[Figure]:
    """A line for each arm of paging, with what of its paged state was on the card; a cross where it ended too early."""
    lines = []
    for arm in arms:
        found = arm.get("series") or {}
        columns = (found.get(key, []) for key in ("step", "peak_gib", "managed_resident_gib"))
        points = [(float(step), peak + (resident or 0.0)) for step, peak, resident in zip(*columns, strict=True)]
        if points:
            name = f"{arm['room']}, {arm['optimizer']}: {arm['status'].replace('_', ' ')}"
            lines.append(curves.line(name, (arm["optimizer"], arm["room"]), points, arm["status"] != "completed"))
    if not lines:
        return
    groups, dashes = (list(dict.fromkeys(line[name] for line in lines)) for name in ("group", "by"))
    on_cpu = all(arm.get("device") == "cpu" for arm in arms)
    title = RESIDENT if on_cpu else STEP
    stored = {"seeds": lines, "means": []}
    made = curves.rows(stored, None)
    values = [point["value"] for point in made["lines"]]
    margin = (max(values) - min(values)) * 0.06 or 0.02 * max(values)  # the spikes are what is looked for
    spec = charts.specification(curves.chart(title, groups, dashes, [min(values) - margin, max(values) + margin]), made)
    legends = [Legend("group", "colour", groups), Legend("by", "dash", dashes)]
    what = (
        "The process's resident set: a CPU pages nothing"
        if on_cpu
        else ("The allocator's peak of each step, and the paged state that was on the card then")
    )
    store = {"metrics": {title: stored}, "metric": title, "smooth": None}
    name = "A long sentence arrives: memory by step"
    yield Figure("memory", name, f"{what}; cross: not completed.", spec, legends, "y", "curves", store)

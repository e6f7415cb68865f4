"""What training an arm costs, where each trial ran alone: time of a step, predicted peak by kind, bytes on disk."""

from collections.abc import Iterator
from functools import partial

from loralab.analysis.arms import Arm, Comparison
from loralab.analysis.trials import TrialResult
from loralab.analysis.values import is_number
from loralab.reporting import charts
from loralab.reporting.charts import Figure, Legend
from loralab.reporting.html import Cell, Head, Section, render
from loralab.reporting.labels import height, row_axis, row_labels
from loralab.reporting.table import MIB, Column, column, memory

KINDS = {  # columns, and the kinds of a plan (planning/tracker.py) that each adds up
    "base": ("base", "constants"),
    "trained": ("adapter",),
    "gradients": ("gradients",),
    "state": ("optimizer",),
    "activations": ("activations", "logits", "transient"),
}
READING = (
    "Cost of a trial that ran alone: the predicted peak of the step that was measured (peak alone is of the largest "
    "batch that the data can give), split by what lay in memory at that moment (gradients are 0 where the peak lies "
    "before they exist; state is the optimizer's; activations with logits and what an operator needs for a moment); "
    "step: seconds of an average step, measured, without those whose memory was profiled, as train s; adapter file: on "
    "disk"
)


def by_kind(arm: Arm) -> dict[str, float]:
    """Bytes of the peak and of each column, of the completed trial with the highest predicted peak; empty where no
    record has them."""
    split = [trial for trial in arm.ok if isinstance(trial.get("memory.predicted_by_kind"), dict)]
    highest = max(split, key=lambda trial: float(trial.get("memory.predicted_peak_bytes") or 0), default=None)
    return {} if highest is None else _kinds(highest)


def step_seconds(arm: Arm) -> float | None:
    """Of an average step: its tokens over the speed, so that steps whose memory was profiled do not count."""
    tokens, steps, speed = (arm.measured(f"time.{key}") for key in ("tokens", "steps", "tokens_per_s"))
    return tokens / steps / speed if tokens and steps and speed and arm.pack_size == 1 else None


def columns(comparison: Comparison) -> list[Column]:
    """Empty unless every arm ran alone and some arm's peak is known by kind."""
    arms = comparison.arms
    if any(arm.ok and arm.pack_size != 1 for arm in arms) or not any(by_kind(arm) for arm in arms):
        return []
    return [
        column("step s", step_seconds, "{:.3f}".format),
        *(column(title, partial(_bytes, title), memory) for title in ("peak", *KINDS)),
        column("adapter file", lambda arm: arm.largest.get("adapter.bytes"), memory),
    ]


def section(comparison: Comparison) -> Section | None:
    """Of the page; None where there is nothing to show."""
    shown = columns(comparison)
    if not shown:
        return None
    heads = [Head("row", key=True), *(Head(column.title) for column in shown)]
    rows = [
        [Cell(arm.name, arm.name, "key"), *(Cell(column.text(arm), column.number(arm)) for column in shown)]
        for arm in comparison.arms
    ]
    return Section(render("cost.html", heads=heads, rows=rows, notes=[READING]), list(_figures(comparison)))


def _figures(comparison: Comparison) -> Iterator[Figure]:
    """The peak of each arm, split by what lay in memory."""
    import altair as alt

    known = [(arm, kinds) for arm in comparison.arms if (kinds := by_kind(arm))]
    labels = row_labels([arm for arm, _ in known])
    rows = [
        {
            **{"name": arm.name, "label": labels[arm.name], "kind": title, "order": order},
            **{"value": kinds[title] / MIB, "text": memory(kinds[title])},
        }
        for arm, kinds in known
        for order, title in enumerate(KINDS)
    ]
    chart = alt.Chart(alt.NamedData("rows")).mark_bar(height=15)
    chart = chart.encode(
        x=alt.X("value:Q", title="predicted peak memory of the measured step (MiB)", stack=True),
        y=row_axis(),
        color=charts.colour(list(KINDS), "kind"),
        order="order:Q",
        tooltip=[alt.Tooltip("name:N", title="row"), alt.Tooltip("kind:N"), alt.Tooltip("text:N", title="memory")],
    )
    spec = charts.specification(charts.layers(chart), {"rows": rows}, height([*labels.values()]))
    caption = "Of the completed trial with the highest predicted peak, what lay in memory at that moment."
    legend = Legend("kind", "colour", list(KINDS))
    yield Figure("cost", "Peak memory by kind", caption, spec, [legend])


def table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of text, without any where there is nothing to show; the first columns are the axes."""
    shown = columns(comparison)
    titles = [*comparison.results.short.values(), *(column.title for column in shown)]
    rows = [[*arm.values.values(), *(column.text(arm) for column in shown)] for arm in comparison.arms]
    return titles, rows if shown else []


def plain(arm: Arm) -> dict[str, object]:
    """For results.json; None where it is not known."""
    return {
        "step_s": step_seconds(arm),
        "predicted_by_kind": by_kind(arm) or None,
        "adapter_bytes": arm.largest.get("adapter.bytes"),
        "optimizer_state_bytes": arm.largest.get("optimizer.state_bytes"),
    }


def _kinds(trial: TrialResult) -> dict[str, float]:
    sizes = {kind: float(size) for kind, size in trial.get("memory.predicted_by_kind").items() if is_number(size)}
    summed = {title: sum(sizes.get(kind, 0.0) for kind in kinds) for title, kinds in KINDS.items()}
    return {"peak": float(trial.get("memory.predicted_peak_bytes") or sum(summed.values())), **summed}


def _bytes(title: str, arm: Arm) -> float | None:
    return by_kind(arm).get(title)

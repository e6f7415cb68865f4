"""The memory section of a page: what was paged, what each phase needed, and the timeline of the arms on one axis."""

from collections.abc import Iterator, Sequence

from loralab.analysis.arms import Arm, Comparison
from loralab.analysis.trials import TrialResult
from loralab.analysis.values import Json, is_number
from loralab.reporting import charts, curves, spikes
from loralab.reporting.charts import Figure, Legend
from loralab.reporting.html import Cell, Head, Section, render
from loralab.reporting.table import MIB

PHASES = ("forward", "backward", "optimizer")
SOURCES = {  # what a timeline is drawn of, best first: the metric of a row and what it is called
    "memory/device_used_gib": "memory in use on the device, managed pages included (GiB)",
    "memory/peak": "allocator's peak of the step (GiB)",
}
PAGED = ["paged", "not paged"]
HEADS = (
    Head("row", key=True),
    Head("paging", "really paged, as the optimizer's own state says", key=True),
    Head("state MiB", "all optimizer state"),
    Head("8-bit", "share of the state in 8 bits"),
    Head("paged", "share of the state in managed memory"),
    *(Head(f"{phase} MiB", f"highest allocator peak of the phase, {phase}") for phase in PHASES),
    Head("optimizer ms", "time of the optimizer's phase, a step"),
    Head("spikes", "steps far above the rolling median"),
    Head("ended", "completed, or out of memory"),
)


def section(comparison: Comparison) -> Section | None:
    """None where no trial asked for paging: the results table holds peaks already."""
    trials = [trial for arm in comparison.arms for trial in arm.trials]
    if all(_paging(trial) in ("", "off") for trial in trials):
        return None
    rows = [list(_cells(arm)) for arm in comparison.arms]
    body = render("memory.html", heads=HEADS, rows=rows, notes=list(_notes(trials)))
    return Section(body, list(spikes.predicted(comparison) or _timelines(comparison)))


def _cells(arm: Arm) -> Iterator[Cell]:
    name = arm.name + (f" (pack of {arm.pack_size})" if (arm.pack_size or 1) > 1 else "")
    yield Cell(name, name, "key")
    states = sorted({_paging(trial) for trial in arm.trials} - {""})
    yield Cell(", ".join(states) or "-", kind="key trouble" if "nothing" in states else "key")
    state, eight = arm.largest.get("optimizer.state_bytes"), arm.largest.get("optimizer.eight_bit_bytes")
    yield _number(state, 1 / MIB, "{:.2f}")
    yield _number(eight / state if state and eight is not None else None, 100, "{:.0f}%")
    yield _number(arm.means.get("optimizer.paged_fraction"), 100, "{:.0f}%")
    for phase in PHASES:
        yield _number(_largest(arm, f"memory.by_phase.{phase}"), 1 / MIB, "{:.1f}")
    seconds, steps = arm.measured("memory.seconds_by_phase.optimizer"), arm.means.get("time.steps")
    yield _number(seconds / steps if seconds is not None and steps else None, 1000, "{:.2f}")
    yield _number(_largest(arm, "memory.spike_count"), 1, "{:.0f}")
    ends = [trial.status.replace("_", " ") for trial in arm.trials]
    counted = ", ".join(f"{ends.count(end)} {end}" for end in dict.fromkeys(ends))
    yield Cell(counted, counted, "" if len(arm.ok) == len(arm.trials) else "trouble")


def _largest(arm: Arm, key: str) -> float | None:
    """The largest over all trials, those that ran out of memory too: what they used is the point of them.

    None where seeds ran in different packs, whose memory is not one thing.
    """
    values = [trial.get(key) for trial in arm.trials]
    return None if len(arm.packs) > 1 else max((float(value) for value in values if is_number(value)), default=None)


def _number(value: float | None, factor: float, form: str) -> Cell:
    return Cell("-" if value is None else form.format(value * factor), value)


def _notes(trials: Sequence[TrialResult]) -> Iterator[str]:
    """Each reason why nothing was paged, once."""
    yield from dict.fromkeys(f"{note}." for trial in trials if (note := trial.get("optimizer.note")))
    if all(_paging(trial) in ("", "off", "not applicable") for trial in trials):
        yield (
            "Paging is not applicable on this machine: a paged row is its unpaged twin here, and what lies between "
            "the two is noise."
        )
    if crowded := sum(bool(trial.get("memory.other_processes")) for trial in trials):
        yield f"Other processes used the card during {crowded} trials; device figures count their memory too."


def _timelines(comparison: Comparison) -> Iterator[Figure]:
    """One line per run, paged and unpaged on one axis; a cross where a run ended too early."""
    runs = [(trial, trial.curves()) for arm in comparison.arms for trial in arm.trials]
    source = next((key for key in SOURCES if any(_series(rows, key) for _, rows in runs)), None)
    if source is None:
        return
    series = [(trial, points) for trial, rows in runs if (points := _series(rows, source))]
    lines = [
        curves.line(
            comparison.results.describe(trial), (_optimizer(trial), PAGED[_paging(trial) != "on"]), points, not trial.ok
        )
        for trial, points in series
    ]
    on_cpu = all(trial.get("memory.device") == "cpu" for trial, _ in runs)
    title = "resident memory of the process (GiB)" if on_cpu else SOURCES[source]
    names = list(dict.fromkeys(_optimizer(trial) for trial, _ in series))
    stored = {"seeds": lines, "means": []}
    made = curves.rows(stored, None)
    domain = charts.without_spikes([point["value"] for point in made["lines"]])
    spec = charts.specification(curves.chart(title, names, PAGED, domain), made)
    legends = [Legend("group", "colour", names), Legend("by", "dash", PAGED)]
    caption = f"One line per run, {len(lines)} of {len(runs)} runs with a series; cross: not completed."
    store = {"metrics": {title: stored}, "metric": title, "smooth": None}
    yield Figure("memory", "Memory by step, with and without paging", caption, spec, legends, "y", "curves", store)


def _series(rows: Sequence[Json], source: str) -> list[tuple[float, float]]:
    """(step, GiB) of the rows that have it."""
    keys = [f"memory/{phase}_peak_gib" for phase in PHASES] if source == "memory/peak" else [source]
    peaks_by_step = [(row["step"], [float(row[key]) for key in keys if is_number(row.get(key))]) for row in rows]
    return [(float(step), max(peaks)) for step, peaks in peaks_by_step if peaks]


def _optimizer(trial: TrialResult) -> str:
    return str(trial.get("optimizer.name") or "?")


def _paging(trial: TrialResult) -> str:
    return str(trial.get("optimizer.paging") or "")

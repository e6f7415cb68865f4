"""The memory section of a page: what was paged, what each phase needed, and the timeline of the arms on one axis."""

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from loralab.reporting import svg
from loralab.reporting.axes import is_number, lookup
from loralab.reporting.figures import Figure
from loralab.reporting.gather import Study, Trial, curves
from loralab.reporting.html import cell, figure, head, sort_key, table
from loralab.reporting.rows import Row
from loralab.reporting.table import MIB, measured, pack_size, trial_text, where

PHASES = ("forward", "backward", "optimizer")
SOURCES = {  # what a timeline is drawn of, best first: the metric of a row and what it is called
    "memory/device_used_gib": "memory in use on the device, managed pages included (GiB)",
    "memory/peak": "allocator's peak of the step (GiB)",
}


def section(study: Study, found: Sequence[Row]) -> str:
    """Empty where no trial asked for paging: the results table holds peaks already."""
    if not any(_paging(trial) not in ("", "off") for row in found for trial in row.trials):
        return ""
    drawn = "".join(figure(one.title, one.body, one.caption) for one in timelines(study, found))
    figures = f'<div class="figures">\n{drawn}\n</div>' if drawn else ""
    return f"<section>\n<h2>Memory and paging</h2>\n{_table(study, found)}\n{figures}\n</section>"


def _table(study: Study, found: Sequence[Row]) -> str:
    heads = [
        head("row", key=True),
        head("paging", "really paged, as the optimizer's own state says", key=True),
        head("state MiB", "all optimizer state"),
        head("8-bit", "share of the state in 8 bits"),
        head("paged", "share of the state in managed memory"),
        *(head(f"{phase} MiB", f"highest allocator peak of the phase, {phase}") for phase in PHASES),
        head("optimizer ms", "time of the optimizer's phase, a step"),
        head("spikes", "steps far above the rolling median"),
        head("ended", "completed, or out of memory"),
    ]
    body = [f"<tr>{''.join(_cells(study, row))}</tr>" for row in found]
    words = "".join(f'<p class="note">{escape(note)}</p>\n' for note in _notes(found))
    return table(heads, body, "sortable") + words


def _cells(study: Study, row: Row) -> Iterator[str]:
    size = pack_size(row)
    name = where(study, row) + (f" (pack of {size})" if size and size > 1 else "")
    yield cell(name, name, "key")
    states = sorted({_paging(trial) for trial in row.trials} - {""})
    yield cell(", ".join(states) or "-", "", "key trouble" if "nothing" in states else "key")
    state = row.largest("optimizer.state_bytes")
    yield _number(state, 1 / MIB, "{:.2f}")
    eight = row.largest("optimizer.eight_bit_bytes")
    yield _number(eight / state if state and eight is not None else None, 100, "{:.0f}%")
    yield _number(row.average("optimizer.paged_fraction"), 100, "{:.0f}%")
    for phase in PHASES:
        yield _number(_most(row, f"memory.by_phase.{phase}"), 1 / MIB, "{:.1f}")
    seconds, steps = measured(row, "memory.seconds_by_phase.optimizer"), row.average("time.steps")
    yield _number(seconds / steps if seconds is not None and steps else None, 1000, "{:.2f}")
    yield _number(_most(row, "memory.spike_count"), 1, "{:.0f}")
    ends = [trial.status.replace("_", " ") for trial in row.trials]
    told = ", ".join(f"{ends.count(end)} {end}" for end in dict.fromkeys(ends))
    yield cell(told, told, "" if len(row.ok) == len(row.trials) else "trouble")


def _most(row: Row, key: str) -> float | None:
    """The largest over all trials, those that ran out of memory too: what they used is the point of them.

    None where seeds ran in different packs, whose memory is not one thing.
    """
    if len(row.packs) > 1:
        return None
    found = [lookup(trial.record, key) for trial in row.trials]
    return max((float(value) for value in found if is_number(value)), default=None)


def _number(value: float | None, factor: float, form: str) -> str:
    return cell("-" if value is None else form.format(value * factor), sort_key(value))


def _notes(found: Sequence[Row]) -> Iterator[str]:
    """Each reason why nothing was paged, once."""
    notes = [lookup(trial.record, "optimizer.note") for row in found for trial in row.trials]
    for note in dict.fromkeys(str(note) for note in notes if note):
        yield f"{note}."
    if all(_paging(trial) in ("", "off", "not applicable") for row in found for trial in row.trials):
        yield (
            "Paging is not applicable on this machine: a paged row is its unpaged twin here, and what lies between "
            "the two is noise."
        )
    crowded = [trial for row in found for trial in row.trials if lookup(trial.record, "memory.other_processes")]
    if crowded:
        yield f"Other processes used the card during {len(crowded)} trials; device figures count their memory too."


def timelines(study: Study, found: Sequence[Row]) -> Iterator[Figure]:
    """One line per run, paged and unpaged on one axis; a cross where a run ended too early."""
    runs = [(row, trial, curves(trial.folder)) for row in found for trial in row.trials]
    source = next((key for key in SOURCES if any(_rows(rows, key) for _, _, rows in runs)), None)
    if source is None:
        return
    names = list(dict.fromkeys(_name(trial) for _, trial, _ in runs))
    drawn = [
        svg.Curve(trial_text(study, trial), _rows(rows, source), names.index(_name(trial)), not trial.ok, _style(trial))
        for _, trial, rows in runs
    ]
    drawn = [curve for curve in drawn if curve.rows]
    steps = [step for curve in drawn for step, _ in curve.rows]
    on_cpu = all(lookup(trial.record, "memory.device") == "cpu" for _, trial, _ in runs)
    name = "resident memory of the process (GiB)" if on_cpu else SOURCES[source]
    y = svg.scale(name, [value for curve in drawn for _, value in curve.rows])
    legend = svg.legend([(name, at) for at, name in enumerate(names)])
    legend += svg.line_legend([("paged", svg.DASHES[0]), ("not paged", svg.DASHES[1])])
    body = svg.line_plot(drawn, svg.steps("optimizer step", steps), y, description="memory by step")
    caption = f"One line per run, {len(drawn)} of {len(runs)} runs with a series; cross: not completed."
    yield Figure("Memory by step, with and without paging", caption, legend + body)


def _rows(rows: Sequence[dict[str, Any]], source: str) -> list[tuple[float, float]]:
    keys = [f"memory/{phase}_peak_gib" for phase in PHASES] if source == "memory/peak" else [source]
    found = []
    for row in rows:
        values = [float(value) for key in keys if is_number(value := row.get(key))]
        if values and is_number(row.get("step")):
            found.append((float(row["step"]), max(values)))
    return found


def _name(trial: Trial) -> str:
    return str(lookup(trial.record, "optimizer.name") or "?")


def _paging(trial: Trial) -> str:
    return str(lookup(trial.record, "optimizer.paging") or "")


def _style(trial: Trial) -> str:
    return svg.DASHES[0 if _paging(trial) == "on" else 1]

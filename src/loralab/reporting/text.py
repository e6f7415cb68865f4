"""The results as plain text: for a terminal, and in Markdown."""

from collections.abc import Iterable, Sequence
from textwrap import wrap

from loralab.reporting.axes import short_names
from loralab.reporting.gather import Study, reason
from loralab.reporting.notes import general, notes
from loralab.reporting.provenance import question
from loralab.reporting.rows import Row, Table
from loralab.reporting.sets import subject
from loralab.reporting.table import (
    VERSUS,
    Column,
    align,
    columns,
    deviates,
    score_text,
    seeds_text,
    trial_text,
    where,
)
from loralab.reporting.verdicts import verdicts

WIDTH = 100
# Columns that go first when the terminal is narrow.
_EXPENDABLE = (
    *("tokens/s", "base size", "peak memory", "train s", "trainable", "bits overall", "peak alone", "bits/param"),
    "published",
)


def terminal(study: Study, tables: Sequence[Table], width: int = WIDTH) -> str:
    """The results, at most ``width`` columns wide."""
    lines = wrapped(": ".join(filter(None, [study.name, question(study)])), width)
    for part, found in tables:
        if len(tables) > 1:
            lines += ["", *wrapped(subject(part), width)]
        fitted = _fit(part, found, width)
        lines += [*wrapped(measure(part, found), width), "", *fitted]
        lines += _said(notes(part, found, any("(pack of" in line for line in fitted)), width)
    said = [*general(study, tables), *(verdict.text for verdict in verdicts(study, tables))]
    said += [f"{trial.status}: {trial_text(study, trial)}: {reason(trial)}" for trial in study.broken]
    lines += _said(said, width)
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _said(texts: Iterable[str], width: int) -> list[str]:
    lines = [line for text in texts for line in wrapped(text, width, "  ")]
    return ["", *lines] if lines else []


def markdown(study: Study, found: Sequence[Row]) -> str:
    """The same table for a README or an issue."""
    shown = columns(study, found)
    titles = [*short_names(list(study.axes)).values(), study.metric, *(c.title for c in shown), "seeds"]
    body = [[*row.values.values(), *_measured(row, shown)] for row in found]
    lines = [titles, ["---"] * len(titles), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def measure(study: Study, found: Sequence[Row]) -> str:
    """What the metric's column holds."""
    better = "lower" if study.mode == "min" else "higher"
    spread = ": mean +- standard deviation over seeds" if deviates(found) else ""
    marked = ", * marks the best row by its intervals" if any(row.best for row in found) else ""
    return f"{study.metric}{spread}, {better} is better{marked}"


def wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """Printable lines no longer than ``width``, all but the first after ``indent``."""
    flat = "".join(letter if letter.isprintable() else " " for letter in text)
    return wrap(flat, width, subsequent_indent=indent)


def _measured(row: Row, shown: Sequence[Column]) -> list[str]:
    """The cells behind the axes."""
    return [score_text(row) + (" *" if row.best else ""), *(column.text(row) for column in shown), seeds_text(row)]


def _fit(study: Study, found: Sequence[Row], width: int) -> list[str]:
    """Leave out the expendable columns one by one; else number the rows and spell them out below."""
    axes = list(short_names(list(study.axes)).values())
    lines = _narrowed(axes, [[*row.values.values()] for row in found], study, found, width, _EXPENDABLE)
    if max(map(len, lines)) <= width:
        return lines
    numbers = [[str(number)] for number, _ in enumerate(found, 1)]
    lines = _narrowed(["row"], numbers, study, found, width, (*_EXPENDABLE, VERSUS))
    legend = [wrapped(f"{number}: {where(study, row)}", width, "   ") for number, row in enumerate(found, 1)]
    return [*(line[:width] for line in lines), "", *(line for item in legend for line in item)]


def _narrowed(
    heads: list[str], keys: list[list[str]], study: Study, found: Sequence[Row], width: int, expendable: Sequence[str]
) -> list[str]:
    """The table behind the columns ``keys``, without as many of the expendable columns as it takes to fit."""
    shown, lines = columns(study, found), [""]
    for title in ("", *expendable):
        shown = [column for column in shown if column.title != title]
        body = [[*key, *_measured(row, shown)] for key, row in zip(keys, found, strict=True)]
        lines = align([*heads, study.metric, *(c.title for c in shown), "seeds"], body, numeric_from=len(heads))
        if max(map(len, lines)) <= width:
            break
    return lines

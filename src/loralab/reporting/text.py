"""The results as plain text: for a terminal, and in Markdown."""

import shutil
from collections.abc import Iterable, Sequence
from textwrap import wrap

from loralab.analysis.arms import Arm, Comparison
from loralab.analysis.claims import verdicts
from loralab.analysis.comparable import subject
from loralab.analysis.results import SweepResults
from loralab.reporting.notes import general, notes
from loralab.reporting.provenance import question
from loralab.reporting.table import VERSUS, Column, columns, score_text, seeds_text

WIDTH = 100
UNBOUNDED = 10_000
# Columns that go first when the terminal is narrow.
_EXPENDABLE = (
    *("tokens/s", "base size", "peak memory", "train s", "trainable", "bits overall", "peak alone", "bits/param"),
    "published",
)


def terminal_width(most: int = WIDTH) -> int:
    """The terminal's columns, at most ``most``; that where there is no terminal."""
    return min(most, shutil.get_terminal_size((most, 24)).columns)


def terminal(results: SweepResults, comparisons: Sequence[Comparison], width: int = WIDTH) -> str:
    """The results, at most ``width`` columns wide."""
    lines = wrapped(": ".join(filter(None, [results.name, question(results)])), width)
    for comparison in comparisons:
        if len(comparisons) > 1:
            lines += ["", *wrapped(subject(comparison.results), width)]
        fitted = _fit(comparison, width)
        lines += [*wrapped(measure(comparison), width), "", *fitted]
        lines += _paragraphs(notes(comparison, any("(pack of" in line for line in fitted)), width)
    said = [*general(results, comparisons), *(verdict.text for verdict in verdicts(results, comparisons))]
    said += [f"{trial.status}: {results.describe(trial)}: {trial.reason}" for trial in results.broken]
    lines += _paragraphs(said, width)
    return "\n".join(line.rstrip() for line in lines) + "\n"


def markdown(comparison: Comparison) -> str:
    """The same table for a README or an issue."""
    shown = columns(comparison)
    titles = _titles(comparison, list(comparison.results.short.values()), shown)
    lines = [titles, ["---"] * len(titles)]
    lines += [[*arm.values.values(), *_cells(arm, shown)] for arm in comparison.arms]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def measure(comparison: Comparison) -> str:
    """What the metric's column holds."""
    spread = ": mean +- standard deviation over seeds" if comparison.deviates else ""
    marked = ", * marks the best row by its intervals" if comparison.best else ""
    return f"{comparison.results.metric}{spread}, {comparison.results.better} is better{marked}"


def wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """Printable lines no longer than ``width``, all but the first after ``indent``."""
    return wrap(_printable(text), width, subsequent_indent=indent)


def natural_width(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Of the lines that ``aligned`` gives."""
    return sum(max(map(len, cells)) + 2 for cells in zip(titles, *rows, strict=True)) - 2


def aligned(titles: Sequence[str], rows: Iterable[Sequence[str]], right: range = range(0)) -> list[str]:
    """Lines of equal columns below a ruled head, without escape codes; the columns ``right`` are set to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    rule = box.Box("    \n    \n -- \n" + "    \n" * 5, ascii=True)
    table = Table(box=rule, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for at, title in enumerate(titles):
        table.add_column(title, justify="right" if at in right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(_printable, row))
    console = Console(width=UNBOUNDED, color_system=None, markup=False, emoji=False, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get().splitlines()


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _paragraphs(texts: Iterable[str], width: int) -> list[str]:
    lines = [line for text in texts for line in wrapped(text, width, "  ")]
    return ["", *lines] if lines else []


def _titles(comparison: Comparison, axes: list[str], shown: Sequence[Column]) -> list[str]:
    return [*axes, comparison.results.metric, *(column.title for column in shown), "seeds"]


def _cells(arm: Arm, shown: Sequence[Column]) -> list[str]:
    """The cells behind the axes."""
    return [score_text(arm) + (" *" if arm.best else ""), *(column.text(arm) for column in shown), seeds_text(arm)]


def _fit(comparison: Comparison, width: int) -> list[str]:
    """Leave out the expendable columns one by one; else number the rows and spell them out below."""
    axes = list(comparison.results.short.values())
    lines = _narrowed(comparison, axes, [[*arm.values.values()] for arm in comparison.arms], width, _EXPENDABLE)
    if max(map(len, lines)) <= width:
        return lines
    numbers = [[str(number)] for number, _ in enumerate(comparison.arms, 1)]
    lines = _narrowed(comparison, ["row"], numbers, width, (*_EXPENDABLE, VERSUS))
    legend = [wrapped(f"{number}: {arm.name}", width, "   ") for number, arm in enumerate(comparison.arms, 1)]
    return [*(line[:width] for line in lines), "", *(line for item in legend for line in item)]


def _narrowed(
    comparison: Comparison, axes: list[str], keys: list[list[str]], width: int, expendable: Sequence[str]
) -> list[str]:
    """The table behind the columns ``axes``, without as many of the expendable columns as it takes to fit."""
    shown = columns(comparison)
    for title in ("", *expendable):
        shown = [column for column in shown if column.title != title]
        titles = _titles(comparison, axes, shown)
        rows = [[*key, *_cells(arm, shown)] for key, arm in zip(keys, comparison.arms, strict=True)]
        if natural_width(titles, rows) <= width:
            break
    return aligned(titles, rows, range(len(axes) + 1, len(titles) - 1))

"""The results as plain text: for a terminal, and in Markdown."""

from collections.abc import Iterable, Sequence

from loralab.analysis.arms import Arm, Comparison
from loralab.analysis.comparable import subject
from loralab.analysis.full import GAP
from loralab.analysis.published import VERSUS_PUBLISHED
from loralab.analysis.results import SweepResults
from loralab.reporting import cost, subspace
from loralab.reporting.layout import WIDTH, aligned, markdown_table, natural_width, wrapped
from loralab.reporting.notes import messages, notes
from loralab.reporting.provenance import question
from loralab.reporting.table import RATE, VERSUS, Column, columns, score_text, seeds_text

# Columns that go first when the terminal is narrow.
_EXPENDABLE = (
    *("tokens/s", "base size", "peak memory", "train s", "trainable", "bits overall", "scale", RATE, "peak alone"),
    *("bits/param", "published", VERSUS_PUBLISHED, GAP),
)

MOST_ROWS = 60  # of a terminal's table
MOST_TOLD = 20  # trials without a result that a terminal is told of


def terminal(results: SweepResults, comparisons: Sequence[Comparison], width: int = WIDTH) -> str:
    """The results, at most ``width`` columns wide."""
    lines = wrapped(": ".join(filter(None, [results.name, question(results)])), width)
    for comparison in comparisons:
        if len(comparisons) > 1:
            lines += ["", *wrapped(subject(comparison.results), width)]
        fitted = _fit(comparison, width)
        lines += [*wrapped(measure(comparison), width), "", *fitted]
        if len(comparison.arms) > MOST_ROWS:
            text = (
                f"The first {MOST_ROWS} of {len(comparison.arms):,} rows; all are on the page and in report/results.csv"
            )
            lines += ["", *wrapped(text, width)]
        lines += _paragraphs(notes(comparison, any("(pack of" in line for line in fitted)), width)
        lines += _cost(comparison, width)
    lines += subspace.lines(results, width)
    footer = messages(results, comparisons)
    broken = results.broken
    footer += [f"{trial.status}: {results.describe(trial)}: {trial.reason}" for trial in broken[:MOST_TOLD]]
    if len(broken) > MOST_TOLD:
        footer.append(f"and {len(broken) - MOST_TOLD:,} more that are not completed, each in report/results.csv")
    lines += _paragraphs(footer, width)
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _cost(comparison: Comparison, width: int) -> list[str]:
    """The cost table, lines cut at ``width``, and how it is read; empty where there is none."""
    titles, rows = cost.table(comparison)
    table = aligned(titles, rows, range(len(comparison.results.short), len(titles)))
    return ["", *(line[:width] for line in table), "", *wrapped(cost.READING, width)] if rows else []


def markdown(comparison: Comparison) -> str:
    """The same table for a README or an issue."""
    return markdown_table(*table(comparison))


def table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of the whole table."""
    shown = columns(comparison)
    titles = _titles(comparison, list(comparison.results.short.values()), shown)
    return titles, [[*arm.values.values(), *_cells(arm, shown)] for arm in comparison.arms]


def measure(comparison: Comparison) -> str:
    """What the metric's column holds."""
    spread = ": mean +- standard deviation over seeds" if comparison.deviates else ""
    marked = ", * marks the best row by its intervals" if comparison.best else ""
    return f"{comparison.results.metric}{spread}, {comparison.results.better} is better{marked}"


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
    expendable = _EXPENDABLE if comparison.tuned else ("scale", RATE, *_EXPENDABLE)
    arms = comparison.arms[:MOST_ROWS]
    lines = _narrowed(comparison, axes, [[*arm.values.values()] for arm in arms], width, expendable)
    if max(map(len, lines)) <= width:
        return lines
    numbers = [[str(number)] for number, _ in enumerate(arms, 1)]
    lines = _narrowed(comparison, ["row"], numbers, width, (*expendable, VERSUS))
    legend = [wrapped(f"{number}: {arm.name}", width, "   ") for number, arm in enumerate(arms, 1)]
    return [*(line[:width] for line in lines), "", *(line for item in legend for line in item)]


def _narrowed(
    comparison: Comparison, axes: list[str], keys: list[list[str]], width: int, expendable: Sequence[str]
) -> list[str]:
    """The table of the first rows behind the columns ``axes``, without as many of the expendable columns as it takes to
    fit; ``keys``: of each of these rows."""
    shown = columns(comparison)
    for title in ("", *expendable):
        shown = [column for column in shown if column.title != title]
        titles = _titles(comparison, axes, shown)
        rows = [[*key, *_cells(arm, shown)] for key, arm in zip(keys, comparison.arms, strict=False)]
        if natural_width(titles, rows) <= width:
            break
    return aligned(titles, rows, range(len(axes) + 1, len(titles) - 1))

"""The tables of a report for a paper: LaTeX with booktabs."""

import re
from collections.abc import Iterable, Sequence

from loralab.analysis.arms import Comparison
from loralab.analysis.comparable import subject
from loralab.reporting.notes import notes
from loralab.reporting.text import measure, table

TABLE = "table.tex"


def latex(comparisons: Sequence[Comparison]) -> str:
    """A tabular for each table, with all of its rows and columns, and its notes as comments."""
    parts = [_tabular(comparison, len(comparisons) > 1) for comparison in comparisons]
    return "% Written by loralab; in the preamble: \\usepackage{booktabs}\n" + "\n".join(parts)


def _tabular(comparison: Comparison, one_of_several: bool) -> str:
    import pandas as pd

    titles, rows = table(comparison)
    keys = len(comparison.results.axes)
    frame = pd.DataFrame([list(map(_plain, row)) for row in rows], columns=list(map(_plain, titles)), dtype=object)
    layout = "l" * keys + "r" * (len(titles) - keys - 1) + "l"
    head = [*([subject(comparison.results)] if one_of_several else []), f"{measure(comparison)}."]
    tabular = frame.to_latex(index=False, escape=True, column_format=layout)
    return _comments(head) + _set(tabular) + _comments(notes(comparison))


def _plain(text: str) -> str:
    return " ".join(text.split())


def _comments(texts: Iterable[str]) -> str:
    return "".join(f"% {_plain(text)}\n" for text in texts)


def _set(tabular: str) -> str:
    """With a plus-minus and minus signs of mathematics, where numbers have them; and no row begins with what the end of
    the row before would take for its own."""
    signed = re.sub(r"(?<![\w.-])-(?=[\d.])", "$-$", tabular.replace(" +- ", r" $\pm$ "))
    return re.sub(r"(?m)^(?=[\[*])", "{}", signed)

"""What a paper printed for our arms, with its provenance: ``published`` and ``marks`` of ``sweep.paper``, or of
``sweep`` itself."""

from collections.abc import Mapping
from typing import Any

from loralab.analysis.arms import Arm
from loralab.analysis.results import SweepResults
from loralab.analysis.values import is_number

CONFIRMED = "confirmed"


def published(arm: Arm) -> list[float]:
    """The paper's values for an arm, in the order of its columns; empty where it has none."""
    values = _said(arm.results, "published")
    listed = _listed(values.get(arm.label)) if isinstance(values, Mapping) else []
    return [float(value) for value in listed if is_number(value)]


def mark(arm: Arm) -> str | None:
    """How sure it is that the paper printed these values: confirmed (read in its text), unconfirmed, or another word of
    the sweep file; None where it says nothing, or nothing is published for the arm."""
    marks = _said(arm.results, "marks")
    found = marks.get(arm.label) if isinstance(marks, Mapping) and published(arm) else None
    return None if found is None else str(found)


def published_text(arm: Arm) -> str:
    """``25.65 / 15.91``, ``31.07 (unconfirmed)``."""
    values = " / ".join(f"{value:g}" for value in published(arm))
    return values if mark(arm) in (None, CONFIRMED) else f"{values} ({mark(arm)})"


def source(results: SweepResults) -> str:
    """Where the paper's numbers come from; empty where there are none."""
    paper = results.about.get("paper")
    if not isinstance(paper, Mapping) or not paper:
        return ""
    columns = ", ".join(map(str, _listed(paper.get("columns"))))
    return f"Published: {paper.get('table', '')}; {paper.get('metric', '')} ({columns}). Another model and other data"


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _said(results: SweepResults, key: str) -> Any:
    paper = results.about.get("paper")
    return (paper.get(key) if isinstance(paper, Mapping) else None) or results.about.get(key)

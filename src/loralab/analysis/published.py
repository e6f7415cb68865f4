"""What a paper printed for our arms, with its provenance: ``published`` and ``marks`` of ``sweep.paper``, or of
``sweep`` itself."""

from collections.abc import Mapping
from typing import Any

from loralab.analysis.arms import Arm
from loralab.analysis.claim_arms import value_of
from loralab.analysis.results import SweepResults
from loralab.analysis.values import is_number
from loralab.config.claims import key_of

CONFIRMED = "confirmed"


def published(arm: Arm) -> list[float]:
    """The paper's values for an arm, in the order of its columns; empty where it has none."""
    return [float(value) for value in _listed(_said(arm, "published")) if is_number(value)]


def mark(arm: Arm) -> str | None:
    """How sure it is that the paper printed these values: confirmed (read in its text), unconfirmed, or another word of
    the sweep file; None where it says nothing, or nothing is published for the arm."""
    found = _said(arm, "marks")
    return str(found) if found is not None and published(arm) else None


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


def _said(arm: Arm, key: str) -> Any:
    """What stands under ``key`` for an arm, by its value on the sweep's first axis (sweep.json's ``named_by``, of which
    the command line may have left one value; else the first that there is)."""
    about = arm.results.about
    paper = about.get("paper")
    values = (paper.get(key) if isinstance(paper, Mapping) else None) or about.get(key)
    if not isinstance(values, Mapping):
        return None
    axis = about.get("named_by")
    own = value_of(arm, axis) if isinstance(axis, str) else key_of(arm.label)
    return {key_of(name): value for name, value in values.items()}.get(own)

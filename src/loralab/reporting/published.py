"""A paper's numbers: what a sweep file says under ``sweep.paper``, or beside it under ``sweep.published``."""

from collections.abc import Mapping
from typing import Any

from loralab.reporting.axes import is_number

Sweep = Mapping[str, Any]


def values(sweep: Sweep, arm: str) -> list[float]:
    """The paper's values for an arm, in the order of its columns; empty where it has none."""
    arms = _said(sweep, "published")
    found = _listed(arms.get(arm)) if isinstance(arms, Mapping) else []
    return [float(value) for value in found if is_number(value)]


def text(sweep: Sweep, arm: str) -> str:
    """``25.65 / 15.91``."""
    return " / ".join(f"{value:g}" for value in values(sweep, arm))


def claims(sweep: Sweep) -> list[str]:
    """The order that the paper says its arms are in, as ``nf4_double <= fp4_e3m0``."""
    return [str(claim) for claim in _listed(_said(sweep, "claims"))]


def source(sweep: Sweep) -> str:
    """Where the numbers come from; empty where there are none."""
    paper = sweep.get("paper")
    if not paper:
        return ""
    columns = ", ".join(map(str, _listed(paper.get("columns"))))
    return f"Published: {paper.get('table', '')}; {paper.get('metric', '')} ({columns}). Another model and other data."


def _listed(found: Any) -> list[Any]:
    return found if isinstance(found, list) else [] if found is None else [found]


def _said(sweep: Sweep, key: str) -> Any:
    return (sweep.get("paper") or {}).get(key) or sweep.get(key)

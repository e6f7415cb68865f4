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
VERSUS_PUBLISHED = "vs published"  # a column


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


def published_gap(arm: Arm) -> float | None:
    """Our mean less the published value; None where there is none, or the two do not mean the same (``unlike``)."""
    values = published(arm)
    if len(values) != 1 or arm.mean is None or unlike(arm.results):
        return None
    return arm.mean - values[0]


def unlike(results: SweepResults) -> str:
    """Why no difference is taken from the published values: they have several columns, ``sweep.paper.metric`` is not
    our metric (with or without ``val/``), or ``sweep.paper.model`` is another than the trials'; empty where none is."""
    paper = results.about.get("paper")
    paper = paper if isinstance(paper, Mapping) else {}
    if len(_listed(paper.get("columns"))) > 1:
        return "the published values have several columns"
    if paper.get("metric") not in (results.metric, results.metric.rpartition("/")[2]):
        return f"sweep.paper.metric does not say that they are of {results.metric}"
    ours = dict.fromkeys(str(trial.setting("model.name_or_path")) for trial in results.trials if trial.ok)
    theirs = paper.get("model")
    return f"they are of {theirs}, ours of {' | '.join(ours)}" if theirs and set(ours) != {str(theirs)} else ""


def source(results: SweepResults) -> str:
    """Where the paper's numbers come from, and whether a difference is taken from them; empty where there are none."""
    paper, reason = results.about.get("paper"), unlike(results)
    if not isinstance(paper, Mapping) or not paper:
        return f"published: no difference is taken, since {reason}" if results.about.get("published") else ""
    columns = ", ".join(map(str, _listed(paper.get("columns"))))
    where = f"Published: {paper.get('table', '')}; {paper.get('metric', '')}{f' ({columns})' if columns else ''}"
    if reason:
        others = "Another model" if paper.get("model") and reason.startswith("they") else "Another model and other data"
        return f"{where}. {others}; no difference is taken, since {reason}"
    how = "by the same metric on the same model" if paper.get("model") else "by the same metric"
    return f"{where}. {VERSUS_PUBLISHED}: our mean less the published value, {how}; data and settings may be others"


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

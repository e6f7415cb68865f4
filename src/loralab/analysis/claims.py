"""A paper's numbers and claims, and our arms against them: holds, does not hold, cannot tell, not comparable.

They are what a sweep file says under ``sweep.paper``, or beside it under ``sweep.published`` and ``sweep.claims``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loralab.analysis import environments
from loralab.analysis.arms import Arm, Comparison
from loralab.analysis.paired import paired
from loralab.analysis.results import SweepResults
from loralab.analysis.values import canonical, is_number, names, spelled

SIGNS = (" <= ", " >= ", " < ", " > ")


def published(arm: Arm) -> list[float]:
    """The paper's values for an arm, in the order of its columns; empty where it has none."""
    values = _of_paper(arm.results, "published")
    listed = _listed(values.get(arm.label)) if isinstance(values, Mapping) else []
    return [float(value) for value in listed if is_number(value)]


def published_text(arm: Arm) -> str:
    """``25.65 / 15.91``."""
    return " / ".join(f"{value:g}" for value in published(arm))


def source(results: SweepResults) -> str:
    """Where the paper's numbers come from; empty where there are none."""
    paper = results.about.get("paper")
    if not paper:
        return ""
    columns = ", ".join(map(str, _listed(paper.get("columns"))))
    return f"Published: {paper.get('table', '')}; {paper.get('metric', '')} ({columns}). Another model and other data"


@dataclass(frozen=True)
class Verdict:
    """``estimate``: mean paired difference of the claim's left arm less its right one, ``interval``: its 95%
    interval, ``p``: of a difference of 0, all three null where they cannot be had; ``seeds``: that both arms share.
    """

    claim: str
    verdict: str
    why: str
    estimate: float | None = None
    interval: list[float] | None = None
    p: float | None = None
    seeds: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return f"Claim {self.claim}: {self.verdict}; {self.why}."

    def plain(self) -> dict[str, Any]:
        return {**asdict(self), "seeds": list(self.seeds)}


def verdicts(results: SweepResults, comparisons: Sequence[Comparison]) -> list[Verdict]:
    """One verdict for each claim; one for each setting of the other axes where there are several."""
    claims = [str(claim) for claim in _listed(_of_paper(results, "claims"))]
    return [verdict for claim in claims for verdict in _verdicts(results, comparisons, claim)]


def _verdicts(results: SweepResults, comparisons: Sequence[Comparison], claim: str) -> Iterator[Verdict]:
    sign = next((sign for sign in SIGNS if sign in claim), None)
    if sign is None:
        yield Verdict(claim, "cannot tell", "loralab reads claims of two rows and <=, <, >= or > between them")
        return
    left, right = (_label(results, text) for text in claim.split(sign, 1))
    pairs = [pair for comparison in comparisons for pair in _pairs(comparison.arms, left, right)]
    for arm, other in pairs:
        other_axes = [text for axis, text in list(arm.values.items())[1:] if len(results.axes.get(axis, ())) > 1]
        name = f"{claim} ({', '.join(other_axes)})" if other_axes and len(pairs) > 1 else claim
        yield _judged(name, sign, arm, other)
    if not pairs:
        yield _unpaired(claim, comparisons, left, right)


def _judged(claim: str, sign: str, arm: Arm, other: Arm) -> Verdict:
    difference = paired(arm.by_seed, other.by_seed)
    texts = [published_text(arm), published_text(other)]
    published_means = f", {texts[0]} against {texts[1]} published" if all(texts) else ""
    means = f"{arm.mean:.4f} against {other.mean:.4f} here{published_means}"
    if difference is None:
        return Verdict(claim, "cannot tell", f"{means}; the two share no seed")
    below = sign.strip().startswith("<")
    order = "in the published order" if (difference.mean < 0) == below else "the other way round than published"
    means, seeds = f"{means}, {order if difference.mean else 'equal'}", tuple(difference.seeds)
    if difference.interval is None:
        scored = "of one seed" if len(seeds) == 1 else f"{len(seeds)} seeds give one score"
        reason = f"{means}, but {scored}: there is no interval"
        return Verdict(claim, "cannot tell", reason, difference.mean, seeds=seeds)
    low, high = difference.interval if below else (-difference.interval[1], -difference.interval[0])
    verdict = "holds" if high <= 0 else "does not hold" if low > 0 else "cannot tell"
    reason = f"{means}; paired difference {difference.text}, n = {difference.n}"
    reason += ", an interval that holds 0" if verdict == "cannot tell" else ""
    return Verdict(claim, verdict, reason, difference.mean, list(difference.interval), difference.p, seeds)


def _pairs(arms: Sequence[Arm], left: str, right: str) -> Iterator[tuple[Arm, Arm]]:
    """The pairs of measured arms with the labels ``left`` and ``right`` whose other axes are equal."""
    measured = [arm for arm in arms if arm.mean is not None and arm.values]
    for arm in measured:
        for other in measured:
            settings, other_settings = (list(one.values.values())[1:] for one in (arm, other))
            if (arm.label, other.label) == (left, right) and settings == other_settings:
                yield arm, other


def _unpaired(claim: str, comparisons: Sequence[Comparison], left: str, right: str) -> Verdict:
    scored = [arm for comparison in comparisons for arm in comparison.contenders]
    by_label = {name: [arm for arm in scored if arm.label == name] for name in (left, right)}
    missing = [name for name, arms in by_label.items() if not arms]
    if missing:
        return Verdict(claim, "cannot tell", f"{' and '.join(missing)} not measured here")
    arm, other = by_label[left][0], by_label[right][0]
    if arm.environment != other.environment:
        return Verdict(claim, "not comparable", f"measured in other environments; {environments.COMPARED}")
    return Verdict(claim, "not comparable", f"{arm.name} and {right} stand in different tables or settings")


def _label(results: SweepResults, text: str) -> str:
    """The label that the first axis has for the value ``text``; where it has none, the value's own."""
    labels = next(iter(results.axes.values()), [])
    key = canonical(spelled(text))
    return next((label for label in labels if canonical(spelled(label)) == key), names([spelled(text)])[key])


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _of_paper(results: SweepResults, key: str) -> Any:
    return (results.about.get("paper") or {}).get(key) or results.about.get(key)

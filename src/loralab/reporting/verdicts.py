"""A paper's claims against our arms: holds, does not hold, cannot tell, not comparable, by the paired interval."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loralab.analysis.paired import Difference, paired
from loralab.reporting import environments, published
from loralab.reporting.axes import canonical, names, spelled
from loralab.reporting.gather import Study
from loralab.reporting.rows import Row, Table
from loralab.reporting.table import where

SIGNS = (" <= ", " >= ", " < ", " > ")


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


def verdicts(study: Study, tables: Sequence[Table]) -> list[Verdict]:
    """One for each claim, more where other axes give its arms several rows."""
    return [verdict for claim in published.claims(study.about) for verdict in _claim(study, tables, claim)]


def _claim(study: Study, tables: Sequence[Table], claim: str) -> Iterator[Verdict]:
    sign = next((sign for sign in SIGNS if sign in claim), None)
    if sign is None:
        yield Verdict(claim, "cannot tell", "loralab reads claims of two rows and <=, <, >= or > between them")
        return
    left, right = (_arm(study, text) for text in claim.split(sign, 1))
    pairs = [(one, other) for _, found in tables for one, other in _pairs(found, left, right)]
    for one, other in pairs:
        rest = [text for axis, text in list(one.values.items())[1:] if len(study.axes.get(axis, ())) > 1]
        yield _judged(study, f"{claim} ({', '.join(rest)})" if rest and len(pairs) > 1 else claim, sign, one, other)
    if not pairs:
        yield _unpaired(claim, tables, left, right)


def _judged(study: Study, claim: str, sign: str, one: Row, other: Row) -> Verdict:
    found = paired(one.by_seed, other.by_seed)
    means = f"{one.mean:.4f} against {other.mean:.4f} here{_beside(study, one, other)}"
    if found is None:
        return Verdict(claim, "cannot tell", f"{means}; the two share no seed")
    below = sign.strip().startswith("<")
    against = found.mean > 0 if below else found.mean < 0
    order = "the other way round than published" if against else "in the published order"
    order = "equal" if found.mean == 0 else order
    if found.interval is None:
        why = f"{means}, {order}, but {_single(found)}: there is no interval"
        return Verdict(claim, "cannot tell", why, found.mean, seeds=tuple(found.seeds))
    low, high = found.interval if below else (-found.interval[1], -found.interval[0])
    verdict = "holds" if high <= 0 else "does not hold" if low > 0 else "cannot tell"
    why = f"{means}, {order}; paired difference {found.text}, n = {found.n}"
    why += ", an interval that holds 0" if verdict == "cannot tell" else ""
    return Verdict(claim, verdict, why, found.mean, list(found.interval), found.p, tuple(found.seeds))


def _single(found: Difference) -> str:
    return "of one seed" if len(found.seeds) == 1 else f"{len(found.seeds)} seeds give one score"


def _beside(study: Study, one: Row, other: Row) -> str:
    texts = [published.text(study.about, next(iter(row.values.values()), "")) for row in (one, other)]
    return f", {texts[0]} against {texts[1]} published" if all(texts) else ""


def _pairs(found: Sequence[Row], left: str, right: str) -> Iterator[tuple[Row, Row]]:
    """Rows of the two arms that differ in nothing else."""
    for one in found:
        for other in found:
            ends = [list(row.values.values()) for row in (one, other)]
            named = [end[:1] for end in ends] == [[left], [right]]
            if named and ends[0][1:] == ends[1][1:] and one.mean is not None and other.mean is not None:
                yield one, other


def _unpaired(claim: str, tables: Sequence[Table], left: str, right: str) -> Verdict:
    scored = [(part, row) for part, found in tables for row in found if row.mean is not None]
    there = {name: [(p, r) for p, r in scored if next(iter(r.values.values()), "") == name] for name in (left, right)}
    missing = [name for name, found in there.items() if not found]
    if missing:
        return Verdict(claim, "cannot tell", f"{' and '.join(missing)} not measured here")
    (part, one), (_, other) = there[left][0], there[right][0]
    if one.environment != other.environment:
        return Verdict(claim, "not comparable", f"measured in other environments; {environments.COMPARED}")
    return Verdict(claim, "not comparable", f"{where(part, one)} and {right} stand in different tables or settings")


def _arm(study: Study, text: str) -> str:
    """An arm as its axis spells it."""
    labels = next(iter(study.axes.values()), [])
    wanted = canonical(spelled(text))
    return next((one for one in labels if canonical(spelled(one)) == wanted), names([spelled(text)])[wanted])

"""What a sweep file claims, against our arms: holds, does not hold, cannot tell, not comparable.

Claims are of ``sweep.paper.claims`` or ``sweep.claims`` (``config/claims.py`` has their grammar). A claim of numbers
that no seed moves (counts, bits, bytes) is held against the number itself. Any other is tested over the seeds that its
arms share, as ``analysis/inference.py`` says, and decided at 5% for all claims of the sweep together (Holm).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from loralab.analysis.arms import Arm, Comparison
from loralab.analysis.claim_arms import Unmatched, axis_named, first_axis, matched, of_pack, scores
from loralab.analysis.evidence import Evidence, evidence, shown
from loralab.analysis.inference import ALPHA, POWER, holm
from loralab.analysis.paired import replicates
from loralab.analysis.published import published_text
from loralab.analysis.results import SweepResults
from loralab.config.claims import Claim, as_number, listed, read
from loralab.errors import ConfigError

MORE_SEEDS = "seeds are added by running the sweep again with more of them, as in seed=0,1,2,3,4: what is done stays"
_CLOSE = 1e-9  # relative: by which a number that is computed may differ from the one it equals


@dataclass(frozen=True)
class Verdict:
    """``estimate``: what the claim is about, such as the mean paired difference of its left arm less its right one, or
    the change from one value of its axis to the next; ``interval``: the 95% t interval about it, not corrected;
    ``p``: of the t test that decides, for an order the two-sided one of a difference of 0; ``p_holm``: the same
    corrected for all claims of the sweep; ``p_permutation``: of the sign-flip test; ``interval_bootstrap``: BCa. Null
    where they cannot be had. ``seeds``: that its arms share; ``seeds_needed``: with which it would likely be told,
    null where it is told or nothing is known of the spread."""

    claim: str
    verdict: str
    why: str
    estimate: float | None = None
    interval: list[float] | None = None
    p: float | None = None
    seeds: tuple[str, ...] = ()
    p_permutation: float | None = None
    p_holm: float | None = None
    interval_bootstrap: list[float] | None = None
    seeds_needed: int | None = None
    metric: str | None = None
    where: dict[str, str] = field(default_factory=dict)
    source: str = ""

    @property
    def text(self) -> str:
        """One paragraph, the verdict before its reason."""
        where = "".join(f", {axis} = {value}" for axis, value in self.where.items())
        about = f" [{self.metric or ''}{where}]".replace("[, ", "[") if self.metric or where else ""
        return f"Claim {self.claim}{about}: {self.verdict}; {self.why}.{f' Source: {self.source}.' * bool(self.source)}"

    def plain(self) -> dict[str, Any]:
        return {**asdict(self), "seeds": list(self.seeds)}


@dataclass(frozen=True)
class _Finding:
    """A verdict as far as it follows from its own arms; ``tested``: what decides it, after Holm's correction."""

    verdict: Verdict
    tested: Evidence | None = None


def verdicts(results: SweepResults, comparisons: Sequence[Comparison]) -> list[Verdict]:
    """One verdict for each claim; one for each setting of the axes that a claim does not name, where there are several.
    A claim that cannot be read is one that cannot be told, and its ``why`` says what is wrong with it."""
    findings = [one for claim in listed(results.about) for one in _findings(results, comparisons, claim)]
    tested = [one.tested.p for one in findings if one.tested is not None]
    corrected = iter(holm(np.array(tested)).tolist() if tested else ())
    return [
        one.verdict if one.tested is None else _decided(one.verdict, one.tested, next(corrected), len(tested))
        for one in findings
    ]


def _findings(results: SweepResults, comparisons: Sequence[Comparison], said: Any) -> list[_Finding]:
    try:
        claim = read(said)
        _check_ambiguous(results, claim)
        _check_not_tuned(comparisons, claim)
        found = matched(results, comparisons, claim)
        axis = _axis(results, claim)
    except ConfigError as error:
        text = said.get("claim") if isinstance(said, dict) else said
        return [_Finding(Verdict(str(text), "cannot tell", str(error)))]
    blank = Verdict(claim.text, "", "", metric=claim.metric, where=claim.where, source=claim.source)
    if chose := next((one.tuned for one in comparisons if one.tuned and one.tuned.whole.metric == claim.metric), None):
        found = Unmatched("not comparable", f"{claim.metric} chose each row's {' and '.join(chose.names)}")
    if isinstance(found, Unmatched):
        return [_Finding(replace(blank, verdict=found.verdict, why=found.why))]
    names = [f"{claim.text} ({one.setting})" if one.setting and len(found) > 1 else claim.text for one in found]
    each = [_finding(replace(blank, claim=name), claim, one.arms, axis) for name, one in zip(names, found, strict=True)]
    return _once(each, claim.text)


def _once(findings: list[_Finding], claim: str) -> list[_Finding]:
    """One finding, without its setting, where all are the same and nothing was tested: numbers that the other axes do
    not move."""
    bare = [replace(one, verdict=replace(one.verdict, claim=claim)) for one in findings]
    return bare[:1] if all(one.tested is None and one == bare[0] for one in bare) else findings


def _check_ambiguous(results: SweepResults, claim: Claim) -> None:
    """Raises ConfigError where the number that an arm is to equal is also how an arm is called."""
    first = first_axis(results, claim)
    if claim.form == "number" and claim.right in results.axes.get(first, ()):
        raise ConfigError(claim.ambiguous(results.short[first]))


def _check_not_tuned(comparisons: Sequence[Comparison], claim: Claim) -> None:
    """Raises ConfigError where the claim names an axis on which each arm has a value of its own choice."""
    written = {claim.axis, *claim.where, *(axis for arm in claim.arms for axis in arm)}
    for tuned in (one.tuned for one in comparisons if one.tuned is not None):
        if named := written & {*tuned.axes, *tuned.names}:
            raise ConfigError(f"each row has its own best {named.pop()}, which sweep.tune chose; valid: other axes")


def _axis(results: SweepResults, claim: Claim) -> str:
    """The claim's axis by its full name, empty where it has none. Raises ConfigError where the claim needs an order and
    the axis's values have none."""
    if not claim.axis:
        return ""
    axis = axis_named(results, claim.axis)
    words = [label for label in results.axes.get(axis, ()) if as_number(label) is None]
    if claim.form != "flat" and words:
        raise ConfigError(claim.without_order(words[0]))
    return axis


def _finding(blank: Verdict, claim: Claim, arms: Sequence[Arm], axis: str) -> _Finding:
    if of_pack(arms, claim.metric):
        why = f"{claim.metric} is of all trials of a pack together; hydra.launcher.pack=off measures each alone"
        return _Finding(replace(blank, verdict="not comparable", why=why))
    by_arm = [scores(arm, claim.metric) for arm in arms]
    seeds = tuple(seed for seed in by_arm[-1] if all(seed in values for values in by_arm))
    means = _means(claim, arms, by_arm, axis)
    if not all(by_arm):
        lacking = next(arm.name for arm, values in zip(arms, by_arm, strict=True) if not values)
        why = f"{lacking} has no {claim.metric or arms[0].results.metric} in its records"
        return _Finding(replace(blank, verdict="cannot tell", why=why))
    if not seeds:
        between = "the two share" if len(arms) == 2 else "they share"
        return _Finding(replace(blank, verdict="cannot tell", why=f"{means}; {between} no seed"))
    values = np.array([[one[seed] for one in by_arm] for seed in seeds])
    if claim.form == "ratio" and values.min() <= 0:
        return _Finding(replace(blank, verdict="cannot tell", why=f"{means}; a ratio needs numbers above 0"))
    n = max(replicates({seed: one[seed] for seed in seeds}) for one in by_arm)
    found = evidence(claim, values if n > 1 else values[:1])
    filled = replace(blank, estimate=found.estimate, seeds=seeds)
    means = ", ".join(filter(None, [means, _order(claim, arms, found) or _steps(claim, arms, values, axis)]))
    if n > 1:
        return _Finding(replace(filled, why=means), found)
    if claim.settled:
        return _Finding(_exact(filled, claim, values[0], means))
    why = f"{means}, but of one seed: there is no interval; {MORE_SEEDS}"
    if len(seeds) > 1:
        why = f"{means}, but {len(seeds)} seeds give one score: there is no interval"
    return _Finding(replace(filled, verdict="cannot tell", why=why))


def _decided(blank: Verdict, found: Evidence, p_holm: float, claims: int) -> Verdict:
    """The verdict at 5% for all ``claims`` of the sweep together."""
    told = p_holm <= ALPHA
    verdict = "cannot tell" if not told else "holds" if found.holds <= found.fails else "does not hold"
    level = ALPHA / claims
    needed = None if told else found.seeds_needed(level)
    why = f"{blank.why}; {found.text(p_holm if claims > 1 else None, claims)}"
    if not told:
        seeds = f"about {needed} seeds are" if needed else "more than 10,000 seeds are"
        power = f"; {seeds} needed ({POWER:.0%} power at {level:.2g}, with this mean and spread)"
        why += f", {found.unclear}{'' if found.gainsaid else power}"
    return replace(
        blank,
        verdict=verdict,
        why=why,
        interval=list(found.interval),
        p=found.p,
        p_permutation=found.p_permutation,
        p_holm=p_holm,
        interval_bootstrap=None if found.bootstrap is None else list(found.bootstrap),
        seeds_needed=needed,
    )


def _exact(blank: Verdict, claim: Claim, values: Any, means: str) -> Verdict:
    """The verdict on numbers that follow from the configuration: no chance is in them."""
    slack = _CLOSE * float(np.abs(values).max())
    if claim.axis:
        steps = np.diff(values)
        spread = float(np.ptp(values))
        holds = {"rises": (steps > 0).all(), "falls": (steps < 0).all(), "flat": spread <= claim.margin + slack}[
            claim.form
        ]
    else:
        assert blank.estimate is not None
        low, high = claim.bounds
        slack = _CLOSE if claim.form == "ratio" else slack
        holds = low - slack <= blank.estimate <= high + slack
    why = f"{means}; no seed moves {claim.metric}"
    return replace(blank, verdict="holds" if holds else "does not hold", why=why)


def _means(claim: Claim, arms: Sequence[Arm], by_arm: Sequence[dict[str, float]], axis: str) -> str:
    """``1.0000 against 1.5000 here, 20 against 31.07 published``."""
    means = [shown(sum(values.values()) / len(values)) if values else "-" for values in by_arm]
    if claim.axis:
        told = zip((arm.values[axis] for arm in arms), means, strict=True)
        return f"{arms[0].results.short[axis]} = " + ", ".join(f"{label}: {mean}" for label, mean in told)
    texts = [published_text(arm) for arm in arms]
    published = f", {' against '.join(texts)} published" if all(texts) and claim.metric is None else ""
    return f"{' against '.join(means)} here{published}"


def _order(claim: Claim, arms: Sequence[Arm], found: Evidence) -> str:
    """Which way the two lie, of a claim about an order."""
    if claim.form != "order":
        return ""
    if found.estimate == 0:
        return "equal"
    whose = "published" if claim.metric is None and all(map(published_text, arms)) else "claimed"
    below = claim.sign == "<="
    return f"in the {whose} order" if (found.estimate < 0) == below else f"the other way round than {whose}"


def _steps(claim: Claim, arms: Sequence[Arm], values: Any, axis: str) -> str:
    """The steps along the axis whose means go the other way than claimed."""
    steps = np.diff(values.mean(axis=0)) * {"rises": 1, "falls": -1}.get(claim.form, 0)
    labels = [arm.values[axis] for arm in arms] if axis else []
    against = [f"from {labels[i]} to {labels[i + 1]}" for i in np.flatnonzero(steps < 0)]
    return f"the other way round {', '.join(against)}" if against else ""

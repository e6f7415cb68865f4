"""The numbers that decide one claim: its estimate, intervals and p values, and how they are written."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from loralab.analysis import inference
from loralab.analysis.paired import t_quantile
from loralab.config.claims import Claim

_WORDS = {
    "order": "paired difference",
    "equal": "paired difference",
    "difference": "paired difference",
    "ratio": "paired ratio (geometric mean)",
    "number": "mean",
    "flat": "difference of the two furthest apart",
    "rises": "change from one value to the next (trend)",
    "falls": "change from one value to the next (trend)",
}


@dataclass(frozen=True)
class Evidence:
    """``gaps``: seed by seed, what must lie between ``low`` and ``high`` in the mean; of a ratio the logarithms, of an
    axis the trend, or the two values furthest apart (their interval is not corrected for having been picked, the p
    values are over all pairs). ``holds`` and ``fails``: p of the claim being false, and true."""

    form: str
    gaps: inference.Gaps
    low: float
    high: float
    holds: float
    fails: float

    @property
    def n(self) -> int:
        return len(self.gaps)

    @property
    def p(self) -> float:
        return min(self.holds, self.fails)

    @property
    def estimate(self) -> float:
        return self._said(float(np.mean(self.gaps)))

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the paired t, not corrected for the number of claims; two seeds at least."""
        mean, reach = float(np.mean(self.gaps)), t_quantile(self.n - 1) * self._deviation / math.sqrt(self.n)
        return self._said(mean - reach), self._said(mean + reach)

    @cached_property
    def bootstrap(self) -> tuple[float, float] | None:
        """The 95% BCa interval; None for fewer than five seeds."""
        found = inference.bootstrap(self.gaps)
        return None if found is None else (self._said(found[0]), self._said(found[1]))

    @cached_property
    def p_permutation(self) -> float:
        return inference.permutation(self.gaps, self.low, self.high)

    def seeds_needed(self, level: float) -> int | None:
        """At least one more than there are; None where more than 10,000, and where no number of them follows from the
        spread of the trend."""
        if self.gainsaid:
            return None
        needed = inference.seeds_needed(float(np.mean(self.gaps)), self._deviation, self.low, self.high, level)
        return None if needed is None else max(needed, self.n + 1)

    def text(self, p_holm: float | None, claims: int) -> str:
        """Estimate, intervals and p values; ``p_holm``: None where there is one claim."""
        parts = [f"{_WORDS[self.form]} {self._signed(self.estimate)} [{self._ends(self.interval)}], n = {self.n}"]
        if self.bootstrap is not None:
            parts.append(f"BCa bootstrap [{self._ends(self.bootstrap)}]")
        tests = "TOST p" if self._has_margin and self.holds <= self.fails else "p"
        parts.append(
            f"{tests} = {_p(self.p)}" + ("" if p_holm is None else f", {_p(p_holm)} by Holm for {claims} claims")
        )
        parts.append(f"sign flips p = {_p(self.p_permutation)}{self._least}")
        return ", ".join(parts)

    @property
    def gainsaid(self) -> bool:
        """Whether there is a trend, and a step of the axis that goes the other way by more than chance."""
        low, high = self.interval
        return self.form in ("rises", "falls") and self.p > inference.ALPHA and not low <= 0 <= high

    @property
    def unclear(self) -> str:
        """Why nothing can be told."""
        low, high = self.interval
        if self.gainsaid:
            return "a trend, but a step that likely goes the other way"
        if self._has_margin:
            return f"neither within nor outside {self._ends((self._said(self.low), self._said(self.high)), ' to ')}"
        bound = self._said(self.high if math.isinf(self.low) else self.low)
        if low <= bound <= high:
            return f"an interval that holds {bound:g}"
        return f"an interval that excludes {bound:g} by itself, but not beside the other claims"

    @property
    def _least(self) -> str:
        """What the permutation test could not have found, or did not."""
        if not self._has_margin and self.p_permutation <= 2.0 ** (1 - self.n) and self.p_permutation > inference.ALPHA:
            return f" (the least of {self.n} seeds)"
        return " (which does not follow)" if self.p <= inference.ALPHA < self.p_permutation else ""

    @property
    def _has_margin(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def _deviation(self) -> float:
        return float(np.std(self.gaps, ddof=1))

    def _said(self, value: float) -> float:
        return math.exp(value) if self.form == "ratio" else value

    def _signed(self, value: float) -> str:
        text = shown(value)
        return text if self.form in ("ratio", "number") or text.startswith("-") else f"+{text}"

    def _ends(self, ends: tuple[float, float], between: str = ", ") -> str:
        return between.join(map(self._signed, ends))


def evidence(claim: Claim, values: Any) -> Evidence:
    """What ``values`` (seeds, arms) say of a claim; with one seed an estimate alone, p values of 1."""
    if claim.form in ("rises", "falls"):
        bounds = (0.0, math.inf) if claim.form == "rises" else (-math.inf, 0.0)
        gaps = inference.trend(values)
        p = inference.along(values, claim.form == "rises") if len(values) > 1 else (1.0, 1.0)
        return _evidence(claim, gaps, bounds, p)
    if claim.form == "flat":
        means = values.mean(axis=0)
        gaps = values[:, means.argmax()] - values[:, means.argmin()]
        p = inference.flat(values, claim.margin) if len(values) > 1 else (1.0, 1.0)
        return _evidence(claim, gaps, (-claim.margin, claim.margin), p)
    low, high = claim.bounds
    if claim.form == "ratio":
        gaps = np.log(values[:, 0]) - np.log(values[:, 1])
        low, high = (math.log(bound) if bound > 0 else -math.inf for bound in (low, high))
    else:
        gaps = values[:, 0] - values[:, 1] if values.shape[1] > 1 else values[:, 0]
    p = inference.region(gaps, low, high) if len(values) > 1 else (1.0, 1.0)
    return _evidence(claim, gaps, (low, high), p)


def _evidence(claim: Claim, gaps: Any, bounds: tuple[float, float], p: Any) -> Evidence:
    return Evidence(claim.form, tuple(map(float, gaps)), *bounds, *map(float, p))


def shown(value: float) -> str:
    """``1.2345``; without decimals where it is large, as counts and bytes are."""
    return f"{value:z.4f}" if abs(value) < 10_000 else f"{value:.0f}"


def _p(value: float) -> str:
    return "below 0.0001" if value < 1e-4 else f"{value:.2g}"

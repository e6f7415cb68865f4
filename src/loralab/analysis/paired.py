"""Differences between arms that share their seeds, and with them data order and initialization."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """Mean over ``seeds`` of one arm less the other.

    ``n``: independent differences among them, 1 where no seed changes either arm's score; ``reach``: half the
    t interval and ``p``: of a difference of 0 (two-sided), both None for n = 1.
    """

    seeds: list[str]
    n: int
    mean: float
    reach: float | None
    p: float | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.reach is None else (self.mean - self.reach, self.mean + self.reach)

    def verdict(self, mode: str) -> str:
        """``better`` or ``worse`` where the interval excludes 0, else empty; ``mode`` min: lower is better."""
        if self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return ""
        return "better" if (self.mean < 0) == (mode == "min") else "worse"

    @property
    def text(self) -> str:
        """``-0.0199 [-0.0703, +0.0305]``."""
        if self.interval is None:
            return f"{self.mean:+.4f}"
        return f"{self.mean:+.4f} [{self.interval[0]:+.4f}, {self.interval[1]:+.4f}]"


def replicates(scores: Mapping[str, float]) -> int:
    """How many independent scores these are: seeds that change nothing are one measurement, read several times."""
    return min(1, len(scores)) if len(set(scores.values())) < 2 else len(scores)


def paired(scores: Mapping[str, float], baseline: Mapping[str, float], level: float = LEVEL) -> Difference | None:
    """Seed by seed, over the seeds both have; None where they share none."""
    seeds = [seed for seed in baseline if seed in scores]
    gaps = [scores[seed] - baseline[seed] for seed in seeds]
    if not gaps:
        return None
    n = max(replicates({seed: side[seed] for seed in seeds}) for side in (scores, baseline))
    if n < 2:
        return Difference(seeds, n, gaps[0], None)
    error = statistics.stdev(gaps) / math.sqrt(n)
    mean = statistics.fmean(gaps)
    return Difference(seeds, n, mean, t_quantile(n - 1, level) * error, _p(mean, error, n - 1))


def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """t with P(-t < T < t) = level for Student's T with ``freedom`` degrees of freedom."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _p(mean: float, error: float, freedom: int) -> float:
    """P(|T| >= |mean / error|)."""
    if mean == 0:
        return 1.0
    return max(0.0, 1 - _within(math.atan2(abs(mean), error * math.sqrt(freedom)), freedom))


def _within(angle: float, freedom: int) -> float:
    """P(-t < T < t) for t = sqrt(freedom) tan(angle), exact (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    odd, cosine = freedom % 2, math.cos(angle)
    term, total = cosine**odd, 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * cosine**2
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if odd else total

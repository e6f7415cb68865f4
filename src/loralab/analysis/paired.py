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
    t interval and ``p``: of a difference of 0 (two-sided), both None for n = 1. ``level``: at which it counts; that of
    the interval, or higher where several differences are to hold together.
    """

    seeds: list[str]
    n: int
    mean: float
    reach: float | None
    p: float | None = None
    level: float = LEVEL

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.reach is None else (self.mean - self.reach, self.mean + self.reach)

    def verdict(self, mode: str) -> str:
        """``better`` or ``worse`` where the interval at ``level`` excludes 0, else empty; ``mode`` min: lower wins."""
        if self.p is None or self.p >= 1 - self.level:
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
    n = max(replicates({seed: values[seed] for seed in seeds}) for values in (scores, baseline))
    if n < 2:
        return Difference(seeds, n, gaps[0], None)
    mean, error = statistics.fmean(gaps), statistics.stdev(gaps) / math.sqrt(n)
    return Difference(seeds, n, mean, t_quantile(n - 1, level) * error, _p_value(mean, error, n - 1), level)


def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """t with P(-t < T < t) = level for Student's T with ``freedom`` degrees of freedom."""
    from scipy.special import stdtrit  # what scipy.stats.t calls, without the second that scipy.stats takes to import

    return float(stdtrit(freedom, (1 + level) / 2))


def _p_value(mean: float, error: float, freedom: int) -> float:
    """P(|T| >= |mean / error|)."""
    from scipy.special import stdtr

    if mean == 0:
        return 1.0
    return float(2 * stdtr(freedom, -abs(mean) / error)) if error else 0.0

"""Differences between arms that share their seeds, and with them data order and initialization."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """Mean over ``seeds`` of one arm less the other; ``reach``: half the t interval, None for one seed."""

    seeds: list[str]
    mean: float
    reach: float | None

    @property
    def text(self) -> str:
        """``-0.0199 [-0.0703, +0.0305]``."""
        if self.reach is None:
            return f"{self.mean:+.4f}"
        return f"{self.mean:+.4f} [{self.mean - self.reach:+.4f}, {self.mean + self.reach:+.4f}]"


def paired(scores: Mapping[str, float], baseline: Mapping[str, float]) -> Difference | None:
    """Seed by seed, over the seeds both have; None where they share none."""
    seeds = [seed for seed in baseline if seed in scores]
    gaps = [scores[seed] - baseline[seed] for seed in seeds]
    if not gaps:
        return None
    reach = t_quantile(len(gaps) - 1) * statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
    return Difference(seeds, statistics.fmean(gaps), reach)


def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """t with P(-t < T < t) = level for Student's T with ``freedom`` degrees of freedom."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """P(-t < T < t) for t = sqrt(freedom) tan(angle), exact (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    odd, cosine = freedom % 2, math.cos(angle)
    term, total = cosine**odd, 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * cosine**2
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if odd else total

"""Which values of a tuned setting are not worth further steps: successive halving, made careful.

At a rung every value of an arm has made the same share of its steps. Successive halving (Jamieson and Talwalkar 2016,
arXiv 1502.07943) keeps the better half. Here a value also stays where it lies beside the best one on the grid, since
the best rate moves while a schedule decays, and where its distance from the best one is within the noise over seeds.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import field
from itertools import pairwise
from typing import Annotated

from annotated_types import Gt, MinLen

from loralab.errors import ConfigError
from loralab.numerics.tuning import Setting, beside
from loralab.spec import NotNegative, Share, spec

Rung = Mapping[Setting, Mapping[str, float | None]]  # {setting: {seed: metric; None: failed, nan: not known}}
Portion = Annotated[Share, Gt(0), "a share between 0 and 1"]


@spec("sweep.halving")
class Halving:
    """``sweep.halving`` of a sweep file that tunes. ``rungs``: shares of the steps; ``keep``: of the values at a rung;
    ``noise``: standard errors of the paired difference to the best value, within which a value stays; ``neighbours``:
    values on each side of the best one that stay."""

    rungs: Annotated[list[Portion], MinLen(1), "a list of shares of the steps"] = field(
        default_factory=lambda: [0.125, 0.25, 0.5]
    )
    keep: Portion = 0.5
    noise: NotNegative = 2.0
    neighbours: int = 1

    def __post_init__(self) -> None:
        if any(later <= earlier for earlier, later in pairwise(self.rungs)):
            raise ConfigError(f"sweep.halving.rungs={self.rungs} do not rise; valid: such as [0.125, 0.25, 0.5]")

    def ended(self, rung: Rung, asked: Sequence[Setting], mode: str) -> dict[Setting, str]:
        """{setting: why it ends here} of those of ``asked``; ``rung``: the scores of all settings of one arm that have
        reached it, ``mode``: min or max. A setting with a score that is not known never ends."""
        sign = 1 if mode == "min" else -1
        scores = {
            setting: {seed: sign * value for seed, value in own.items() if value is not None}
            for setting, own in rung.items()
            if all(value is not None for value in own.values())
        }
        known = {s: own for s, own in scores.items() if own and all(map(math.isfinite, own.values()))}
        if not known:
            return {}
        means = {setting: statistics.fmean(own.values()) for setting, own in known.items()}
        ranked = sorted(means, key=means.__getitem__)
        best, kept = ranked[0], ranked[: math.ceil(self.keep * len(ranked))]
        kept += beside(best, list(rung), self.neighbours)
        found = {}
        for setting in asked:
            if setting not in scores:
                found[setting] = "a seed of it has failed"
            elif setting in known and setting not in kept and self._is_worse(known[setting], known[best]):
                found[setting] = f"{sign * means[setting]:.4g}, beside {sign * means[best]:.4g} of the best value"
        return found

    def _is_worse(self, scores: Mapping[str, float], best: Mapping[str, float]) -> bool:
        """Whether the mean paired difference exceeds the noise; of a single seed, which shows none, any does."""
        gaps = [scores[seed] - best[seed] for seed in scores if seed in best]
        if len(gaps) < 2:
            return True
        return statistics.fmean(gaps) > self.noise * statistics.stdev(gaps) / math.sqrt(len(gaps))

"""How much of the variance of the scores each axis of a factorial sweep makes, alone and with another axis (ANOVA)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from loralab.analysis.arms import Arm, Comparison
from loralab.analysis.inference import FEWEST_FOR_BOOTSTRAP
from loralab.records.shared import kept

RESAMPLES = 2000
MOST_NUMBERS = 4_000_000  # that are resampled at once: 32 MB

Array = np.ndarray[Any, Any]
Places = tuple[int, ...]  # of the axes of an effect


@dataclass(frozen=True)
class Effect:
    """``axes``: one of a main effect, two of their interaction; ``share``: of the variance of the scores, without what
    chance adds (epsilon squared, Kelley 1935), so that an axis without effect has 0 in the mean and may have less; with
    a single seed chance is not known, and the share is eta squared. ``interval``: by resampling seeds, None for fewer
    than five; ``p``: of the F test against the spread over seeds, None with a single seed."""

    axes: tuple[str, ...]
    share: float
    interval: tuple[float, float] | None = None
    p: float | None = None


@dataclass(frozen=True)
class Effects:
    """``parts``: main effects, then interactions of two; ``higher``: share of those of three and more axes;
    ``seeds``: share of the spread over seeds, all shares together are 1; ``n``: seeds; ``why``: where there are no
    effects, the reason, else empty.

    Seeds count as replicates, independent of each other; so what a seed does to all rows alike is part of ``seeds``."""

    parts: list[Effect] = field(default_factory=list)
    higher: float = 0.0
    seeds: float = 0.0
    n: int = 0
    why: str = ""

    @property
    def importance(self) -> list[tuple[str, float]]:
        """(axis, share of its main effect and of the interactions that it is part of), the largest first."""
        axes = [part.axes[0] for part in self.parts if len(part.axes) == 1]
        total = {axis: sum(part.share for part in self.parts if axis in part.axes) for axis in axes}
        return sorted(total.items(), key=lambda item: -item[1])

    @property
    def text(self) -> str:
        """One sentence; empty where there are no effects."""
        if not self.parts:
            return ""
        told = [f"{' x '.join(part.axes)} {_percent(part.share)}{_ends(part.interval)}" for part in self.parts]
        rest = [f"higher interactions {_percent(self.higher)}"] * (len(self.importance) > 2)
        rest += [f"seeds {_percent(self.seeds)}"] * (self.n > 1)
        return f"Shares of the variance: {', '.join([*told, *rest])}"

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "importance": [{"axis": axis, "share": share} for axis, share in self.importance]}


@kept
def effects(comparison: Comparison) -> Effects:
    """The effects of the axes with several values on the metric, over the seeds that all rows share; without any, and
    ``why``, where not every combination of values has a score."""
    axes = [axis for axis in comparison.results.moving() if axis not in comparison.results.led]
    if not axes:
        return Effects(why="no axis has several values")
    arms = comparison.contenders
    labels = [list(dict.fromkeys(arm.values[axis] for arm in arms)) for axis in axes]
    cells = {tuple(arm.values[axis] for axis in axes): arm for arm in arms}
    if why := _incomplete(comparison, arms, axes, labels, cells):
        return Effects(why=why)
    shared = [seed for seed in arms[0].by_seed if all(seed in arm.by_seed for arm in arms)]
    seeds = shared if any(arm.n > 1 for arm in arms) else shared[:1]
    if not seeds:
        return Effects(why="the rows share no seed")
    scores = np.empty([*map(len, labels), len(seeds)])
    for place in np.ndindex(scores.shape[:-1]):
        arm = cells[tuple(names[i] for names, i in zip(labels, place, strict=True))]
        scores[place] = [arm.by_seed[seed] for seed in seeds]
    return decomposed(scores, [comparison.results.short[axis] for axis in axes])


def decomposed(scores: Array, axes: Sequence[str]) -> Effects:
    """The effects of ``axes`` on ``scores`` (values of the first axis, of the second, ..., seeds)."""
    if np.ptp(scores) == 0:
        return Effects(why="all scores are equal")
    shares, seeds = _shares(scores[None])
    intervals, p = _intervals(scores), _p(scores)
    parts = [
        Effect(tuple(axes[i] for i in of), float(share[0]), intervals.get(of), p.get(of))
        for of, share in shares.items()
    ]
    higher = 1 - float(seeds[0]) - sum(part.share for part in parts) if len(axes) > 2 else 0.0
    return Effects(parts, higher, float(seeds[0]), scores.shape[-1])


def _shares(stack: Array) -> tuple[dict[Places, Array], Array]:
    """Of each design of a stack (designs, axes ..., seeds) the share of every effect, and that of the seeds."""
    total = ((stack - stack.mean(axis=tuple(range(1, stack.ndim)), keepdims=True)) ** 2).reshape(len(stack), -1).sum(-1)
    total = np.where(total > 0, total, 1.0)
    chance = _chance(stack)
    shares = {of: (found - _freedom(stack[0], of) * chance) / total for of, found in _squares(stack).items()}
    return shares, (stack[0].size - 1) * chance / total


def _chance(stack: Array) -> Array:
    """Mean square over seeds within the cells; 0 with a single seed."""
    within = ((stack - stack.mean(axis=-1, keepdims=True)) ** 2).reshape(len(stack), -1).sum(-1)
    return np.asarray(within / max(1, stack[0].size - stack[0, ..., 0].size))


def _freedom(scores: Array, of: Places) -> int:
    return int(np.prod([scores.shape[i] - 1 for i in of]))


def _squares(stack: Array) -> dict[Places, Array]:
    """{(axis,) or (axis, axis): sum of squares} of each design of a stack (designs, axes ..., seeds). Complete designs
    with as many seeds in every cell are orthogonal: what a least-squares fit of one effect takes from the squares that
    are left does not depend on which others were fitted before, and follows from the means."""
    axes = range(1, stack.ndim - 1)
    cells = stack.mean(axis=-1)
    cells = cells - cells.mean(axis=tuple(axes), keepdims=True)
    main = {i: cells.mean(axis=tuple(j for j in axes if j != i), keepdims=True) for i in axes}
    pairs: dict[Places, Array] = {
        (i, j): cells.mean(axis=tuple(k for k in axes if k not in (i, j)), keepdims=True) - main[i] - main[j]
        for i, j in combinations(axes, 2)
    }
    every: dict[Places, Array] = {(i,): mean for i, mean in main.items()}
    every |= pairs
    per_cell = stack[0].size
    return {
        tuple(i - 1 for i in of): per_cell * (mean**2).mean(axis=tuple(range(1, mean.ndim)))
        for of, mean in every.items()
    }


def _intervals(scores: Array) -> dict[Places, tuple[float, float]]:
    """The 95% percentile interval of each share over resamples of the seeds, the same ones in every row; distances from
    a cell's mean are widened by sqrt(n / (n - 1)), as much as resampling narrows them. Of a large share it covers about
    90% of the time with 5 or 10 seeds, of none more than 95% (tests/analysis/test_effects.py)."""
    n = scores.shape[-1]
    if n < FEWEST_FOR_BOOTSTRAP:
        return {}
    resamples = max(200, min(RESAMPLES, MOST_NUMBERS // scores.size))
    drawn = np.random.default_rng(0).integers(n, size=(resamples, n))
    cells = scores.mean(axis=-1, keepdims=True)
    widened = cells + (scores - cells) * np.sqrt(n / (n - 1))
    shares, _ = _shares(np.moveaxis(widened[..., drawn], -2, 0))
    return {of: (float(np.quantile(s, 0.025)), float(np.quantile(s, 0.975))) for of, s in shares.items()}


def _p(scores: Array) -> dict[Places, float]:
    """Of the F test of each effect; empty with a single seed."""
    from scipy.special import fdtrc

    within = scores.size - scores[..., 0].size
    chance = float(_chance(scores[None])[0])
    if not within or not chance:
        return {}
    squares = {of: (_freedom(scores, of), float(found[0])) for of, found in _squares(scores[None]).items()}
    return {of: float(fdtrc(freedom, within, found / freedom / chance)) for of, (freedom, found) in squares.items()}


def _incomplete(
    comparison: Comparison,
    arms: Sequence[Arm],
    axes: Sequence[str],
    labels: Sequence[Sequence[str]],
    cells: Mapping[tuple[str, ...], Arm],
) -> str:
    """Why the arms are no complete design; empty where they are one."""
    if len({arm.environment for arm in arms}) > 1:
        return "the rows were made in several environments"
    expected = int(np.prod([len(names) for names in labels]))
    if len(cells) < len(arms):
        return "several rows have the same values of the axes"
    if len(cells) < expected or not arms:
        return f"{expected - len(cells)} of {expected} combinations of {' and '.join(axes)} have no score"
    return "" if expected > 1 else "only one row has a score"


def _ends(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" [{_percent(interval[0])}, {_percent(interval[1])}]"


def _percent(share: float) -> str:
    """An estimate outside 0 and 1, as an unbiased one may be, as the end that it is beyond."""
    return f"{min(1.0, max(0.0, share)):.0%}"

"""d90, the smallest dimension that reaches 90% of full fine-tuning (Aghajanyan et al. 2020, arXiv 2012.13255, section
3.2), and which dimension to try next.

Of a score that is better the higher it is, 90% is 0.9 times full fine-tuning's, as in the paper. Of a loss, which has
no such zero, it is 0.9 of full fine-tuning's improvement over the untrained base's.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Gt, MinLen

from loralab.errors import ConfigError
from loralab.spec import Count, Number, Share, Text, spec

UNTRAINED = "trainer.max_steps=0"
Role = int | Literal["full", "base"]  # of a trial: its dimension, or what dimensions are measured by
Scores = dict[Role, dict[str, float]]  # by seed; nan where two trials of a seed disagree


@spec("sweep.d90")
class Search:
    """``sweep.d90`` of a sweep file. Its own trials have the override ``reference``, which others have ``trial`` and a
    value of ``axis`` in place of: first those of ``ladder``, then the middle of the bracket, until it is narrow."""

    ladder: Annotated[list[Count], MinLen(1), "a list of dimensions"]
    reference: Text = "+method=full"
    trial: Text = "+method=intrinsic"
    axis: Text = "adapter.dimension"
    share: Annotated[Share, Gt(0)] = 0.9
    within: Annotated[Number, Gt(1), "a number above 1"] = 2.0  # factor between the ends of a bracket that is narrow

    def role(self, overrides: Sequence[str]) -> Role | None:
        """What a trial with these overrides is for; None: nothing."""
        if self.reference in overrides:
            return "base" if UNTRAINED in overrides else "full"
        values = [word.partition("=")[2] for word in overrides if word.lstrip("+").startswith(f"{self.axis}=")]
        return int(values[-1]) if self.trial in overrides and values and values[-1].isdecimal() else None

    def first(self, trials: Sequence[Sequence[str]], mode: str) -> list[list[str]]:
        """Overrides of the trials to run beside those with the overrides ``trials``: the ladder, and for a loss the
        untrained base. Raises ConfigError where none of them is a reference."""
        if not self._references(trials):
            raise ConfigError(
                f"sweep.d90.reference={self.reference} is an override of none of the {len(trials)} trials; valid: one "
                f"of {', '.join(trials[0])}"
            )
        rungs = [words for dimension in self.ladder for words in self.at(dimension, trials)]
        untrained = [[*words, UNTRAINED] for words in self._references(trials)] if mode == "min" else []
        return [*untrained, *rungs]

    def at(self, dimension: int, trials: Sequence[Sequence[str]]) -> list[list[str]]:
        """Overrides of the trials of one dimension, one for each reference in ``trials``."""
        return [
            [*(self.trial if word == self.reference else word for word in words), f"{self.axis}={dimension}"]
            for words in self._references(trials)
        ]

    def _references(self, trials: Sequence[Sequence[str]]) -> list[Sequence[str]]:
        return [words for words in trials if self.role(words) == "full"]

    def setting(self, overrides: Sequence[str]) -> frozenset[str]:
        """The overrides that the trials of one search share."""
        own = (self.reference, self.trial, UNTRAINED)
        keys = ("seed", self.axis)
        return frozenset(word for word in overrides if word not in own and word.partition("=")[0] not in keys)

    def scores(self, trials: Iterable[tuple[Sequence[str], str, float | None]]) -> dict[frozenset[str], Scores]:
        """{what the trials of a search share: its scores} of trials (overrides, seed, score; None: not completed)."""
        found: dict[frozenset[str], Scores] = {}
        for overrides, seed, score in trials:
            if (role := self.role(overrides)) is not None:
                own = found.setdefault(self.setting(overrides), {}).setdefault(role, {})
                if score is not None:
                    own[seed] = score if own.get(seed, score) == score else math.nan
        return found

    def answer(self, scores: Scores, mode: str) -> "Answer":
        """What ``scores`` say; ``mode``: min for a loss."""
        needed: list[Role] = ["full", "base"] if mode == "min" else ["full"]
        seeds = set.intersection(*(set(scores.get(role, {})) for role in needed))
        means = {role: _mean(own, seeds) for role, own in scores.items() if seeds and seeds <= set(own)}
        means = {role: mean for role, mean in means.items() if math.isfinite(mean)}
        full, base = means.get("full"), means.get("base") if mode == "min" else 0.0
        if full is None or base is None:
            which = " and ".join({"full": self.reference, "base": UNTRAINED}[str(role)] for role in needed)
            return Answer(self, why=f"{which} have no seed that is completed, once, in all")
        threshold = base + self.share * (full - base)
        if (full >= base) if mode == "min" else (full <= 0):
            return Answer(self, threshold, full, base, why=f"{self.reference} is no better than no training")
        tried = {role: mean for role, mean in means.items() if isinstance(role, int)}
        sign = -1 if mode == "min" else 1
        reaching = [d for d, own in tried.items() if sign * own >= sign * threshold or math.isclose(own, threshold)]
        high = min(reaching, default=None)
        low = max((d for d in tried if high is None or d < high), default=None)
        return Answer(self, threshold, full, base, dict(sorted(tried.items())), low, high, tuple(sorted(seeds)))


@dataclass(frozen=True)
class Answer:
    """``high``: d90, the smallest dimension tried whose mean reaches ``threshold``, None where none does; ``low``: the
    largest tried below it. ``full``, ``base``, ``tried`` {dimension: mean}: over ``seeds``; ``why`` there is none."""

    search: Search
    threshold: float | None = None
    full: float | None = None
    base: float | None = None
    tried: dict[int, float] = field(default_factory=dict)
    low: int | None = None
    high: int | None = None
    seeds: tuple[str, ...] = ()
    why: str = ""

    @property
    def following(self) -> int | None:
        """The dimension to try next, the geometric middle of the bracket; None where it is narrow or open."""
        if self.low is None or self.high is None or self.high <= self.search.within * self.low:
            return None
        middle = round(math.sqrt(self.low * self.high))
        return middle if self.low < middle < self.high else None

    @property
    def text(self) -> str:
        """The answer in one sentence."""
        name = f"d{100 * self.search.share:g} ({self.search.axis})"
        if self.why or not self.tried:
            return f"{name}: cannot tell, since {self.why or 'no dimension was tried with every seed'}"
        bracket = (
            f"above {self.low}, which falls short"
            if self.high is None
            else f"{self.high}; {'no smaller one was tried' if self.low is None else f'{self.low} falls short'}"
        )
        of = f"the score of {self.search.reference}" if not self.base else f"the improvement by {self.search.reference}"
        ends = f"{self.full:.4f}" if not self.base else f"{self.base:.4f} untrained, {self.full:.4f} trained"
        seeds = f"{'mean over seeds' if len(self.seeds) > 1 else 'seed'} {', '.join(self.seeds)}"
        return f"{name}: {bracket} ({self.search.share:.0%} of {of} is {self.threshold:.4f}: {ends}; {seeds})"

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        names = ("threshold", "full", "base", "tried", "low", "why")
        own = {name: getattr(self, name) for name in names}
        return {"axis": self.search.axis, "share": self.search.share, "d": self.high, **own, "seeds": list(self.seeds)}


def _mean(scores: Mapping[str, float], seeds: set[str]) -> float:
    return math.fsum(scores[seed] for seed in seeds) / len(seeds)

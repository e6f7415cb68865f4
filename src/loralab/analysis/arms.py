"""Groups trials into arms: one for each configuration, averaged over its seeds only; and compares the arms."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import pandas as pd

from loralab.analysis import environments
from loralab.analysis.comparable import comparable
from loralab.analysis.numbers import numbers
from loralab.analysis.paired import LEVEL, Difference, paired, replicates
from loralab.analysis.pairs import together
from loralab.analysis.results import SweepResults
from loralab.analysis.trials import Pack, TrialResult
from loralab.analysis.tuning import Tuned, tuned
from loralab.analysis.values import UNKNOWN, is_number

MOST_SEARCHED = 2000  # arms; of more, each is held against one that differs in one axis, or against the first


@dataclass(frozen=True)
class Arm:
    """One configuration in one environment. ``means`` and ``largest``: over the completed seeds, of every number that
    records have; ``best``: separated from every other arm by its paired intervals; ``difference``: to the arm
    ``against``, which differs from it in as few axes as can be; ``baseline``: there is none for it."""

    results: SweepResults
    trials: list[TrialResult]
    means: dict[str, float]
    largest: dict[str, float]
    best: bool = False
    baseline: bool = False
    difference: Difference | None = None
    against: "Arm | None" = None

    @cached_property
    def ok(self) -> list[TrialResult]:
        return [trial for trial in self.trials if trial.ok]

    @cached_property
    def values(self) -> dict[str, str]:
        """Its label on each axis."""
        return {axis: (self.ok or self.trials)[0].values[axis] for axis in self.results.axes}

    @property
    def label(self) -> str:
        """Its value on the first axis, by which a paper's arms are named."""
        return next(iter(self.values.values()), "")

    @property
    def name(self) -> str:
        """``quantization = nf4, r = 8``."""
        known = [f"{self.results.short[axis]} = {text}" for axis, text in self.values.items() if text != UNKNOWN]
        return ", ".join(known) or "the only row"

    @property
    def reach(self) -> float | None:
        """Half the interval of its paired difference, where that may be drawn about its mean: where both arms have the
        same seeds."""
        if self.difference is None or self.against is None or set(self.by_seed) != set(self.against.by_seed):
            return None
        return self.difference.reach

    @property
    def environment(self) -> str:
        return self.values.get(environments.AXIS, "")

    @cached_property
    def by_seed(self) -> dict[str, float]:
        """The metric of each completed seed."""
        metric = self.results.metric
        return {trial.seed: value for trial in self.ok if (value := trial.score(metric)) is not None}

    @property
    def scores(self) -> list[float]:
        return list(self.by_seed.values())

    @property
    def n(self) -> int:
        """Independent scores: 1 where no seed changes the score."""
        return replicates(self.by_seed)

    @cached_property
    def mean(self) -> float | None:
        return statistics.fmean(self.scores) if self.n > 1 else next(iter(self.scores), None)

    @cached_property
    def std(self) -> float | None:
        """Sample standard deviation over seeds (n - 1); None for fewer than two."""
        return statistics.stdev(self.scores) if self.n > 1 else None

    @property
    def extent(self) -> list[float]:
        """What a drawing of its score must include: every seed, and the ends of the interval about the mean."""
        mean, reach = self.mean or 0.0, self.reach or 0.0
        return [*self.scores, mean - reach, mean + reach] if self.scores else []

    @cached_property
    def steps(self) -> list[int]:
        """Optimizer steps made, of each completed seed, in order."""
        return sorted(int(steps) for trial in self.ok if is_number(steps := trial.get("time.steps")))

    @property
    def stopped(self) -> int:
        """Completed seeds that early stopping ended."""
        return sum(bool(trial.get("stopped_early")) for trial in self.ok)

    @cached_property
    def packs(self) -> set[Pack | None]:
        """The packs of the completed seeds; None stands for seeds that ran alone."""
        return {trial.pack for trial in self.ok}

    @property
    def pack_size(self) -> int | None:
        """1 for an arm that ran alone; None where its seeds ran in different packs."""
        if len(self.packs) != 1:
            return None
        (pack,) = self.packs
        return int(pack[0]) if pack else 1

    def measured(self, key: str, largest: bool = False) -> float | None:
        """A figure of the process that ran the arm: over seeds that ran alone, or of the one pack that ran all of them;
        None where seeds ran in different packs, whose figures do not compare."""
        if len(self.packs) > 1 or (key.startswith("time.") and not any(self.steps)):
            return None
        return (self.largest if largest else self.means).get(key)

    @property
    def speed(self) -> float | None:
        """Tokens per second: of a trial alone, or of all trials of the arm's pack together."""
        if self.pack_size == 1:
            return self.measured("time.tokens_per_s")
        pack = next(iter(self.packs)) if len(self.packs) == 1 else None
        return self.results.packs.get(pack) if pack and any(self.steps) else None

    @property
    def alone_peak(self) -> float | None:
        """The predicted peak of the largest of its trials by itself, the same however it ran.

        Records of older versions have it of trials that ran alone.
        """
        solo_trials = [trial for trial in self.ok if trial.pack is None]
        old = [trial for trial in solo_trials if not trial.get("memory.alone_peak_bytes")]
        predicted = [float(peak) for trial in old if is_number(peak := trial.get("memory.predicted_peak_bytes"))]
        return max([self.largest.get("memory.alone_peak_bytes", 0.0), *predicted]) or None


@dataclass(frozen=True)
class Comparison:
    """Trials whose scores may be compared, and their arms in the order of the axes: the baseline comes first.

    ``tuned``: how the arms' trials were chosen, where the sweep tunes; None where all trials are compared."""

    results: SweepResults
    arms: list[Arm]
    tuned: Tuned | None = None

    @property
    def contenders(self) -> list[Arm]:
        """The arms among which one could be the best."""
        return [arm for arm in self.arms if arm.scores]

    @property
    def best(self) -> Arm | None:
        return next((arm for arm in self.arms if arm.best), None)

    @property
    def level(self) -> float:
        """Confidence level of each pairwise interval, so that all of them hold together with 95% (Bonferroni)."""
        return _level(self.contenders)

    @property
    def deviates(self) -> bool:
        """True if any arm has a standard deviation."""
        return any(arm.std is not None for arm in self.arms)

    @property
    def noise(self) -> tuple[float, int] | None:
        """(standard deviation over seeds, pooled over the arms; of how many arms): the noise floor. None where no arm
        has several scores."""
        freedoms = {id(arm): arm.n - 1 for arm in self.arms if arm.std is not None}
        if not freedoms:
            return None
        squares = sum(freedoms[id(arm)] * arm.std**2 for arm in self.arms if arm.std is not None)
        return (squares / sum(freedoms.values())) ** 0.5, len(freedoms)

    @property
    def differs_in_seeds(self) -> bool:
        """True if the arms' means are over different seeds, and so do not compare."""
        return len({frozenset(arm.by_seed) for arm in self.contenders}) > 1


def comparisons(results: SweepResults) -> list[Comparison]:
    """One for each set of trials that may be compared; of a sweep that tunes, each arm at its own best value."""
    return [_comparison(inside) for inside in comparable(results)]


def _comparison(results: SweepResults) -> Comparison:
    chosen = tuned(results)
    inside = results if chosen is None else chosen.results
    return Comparison(inside, arms(inside), chosen)


def arms(results: SweepResults) -> list[Arm]:
    """One arm per configuration in the order of the axes; the first value of every axis is the baseline. Of a search
    the best first, and no baseline."""
    keyed = list(zip(_configurations(results), results.trials, strict=True))
    members: dict[str, list[TrialResult]] = {}
    for key, trial in keyed:
        members.setdefault(key, []).append(trial)
    completed = numbers([trial for _, trial in keyed if trial.ok])
    by_arm = completed.groupby([key for key, trial in keyed if trial.ok])
    means, largest = _known(by_arm.mean()), _known(by_arm.max())
    unsorted = [Arm(results, trials, means.get(key, {}), largest.get(key, {})) for key, trials in members.items()]
    order = {(axis, text): index for axis, labels in results.axes.items() for index, text in enumerate(labels)}
    ordered = sorted(unsorted, key=lambda arm: [order.get(value, len(order)) for value in arm.values.items()])
    if results.searched:  # its points were asked for because of each other: they are ranked, and not compared
        return sorted(ordered, key=lambda arm: (arm.mean is None, sign(results.mode) * (arm.mean or 0.0)))
    return _mark_best(_compared(ordered), results.mode)


def _known(frame: pd.DataFrame) -> dict[str, dict[str, float]]:
    """The rows of the frame as {column: number}, without missing numbers, by their index."""
    rows = zip(frame.index, frame.to_numpy().tolist(), strict=True)
    return {
        key: {name: number for name, number in zip(frame.columns, row, strict=True) if not math.isnan(number)}
        for key, row in rows
    }


def _configurations(results: SweepResults) -> list[str]:
    """Of each trial a key, equal for the seeds of one configuration; one without a record gets its likely
    configuration's."""
    axes = [axis for axis in results.axes if axis != environments.AXIS]  # where it would have run is not known
    known = [(place, trial) for place, trial in enumerate(results.trials) if trial.record["config"]]
    own = {place: trial.values.get(environments.AXIS, "") + trial.configuration for place, trial in known}
    by_values = {tuple(trial.values[axis] for axis in axes): place for place, trial in reversed(known)}
    by_words = {words: place for place, trial in reversed(known) if (words := _words(trial))}

    def likely(trial: TrialResult) -> str:
        values = tuple(trial.values[axis] for axis in axes)
        found = [by_words.get(_words(trial)), None if UNKNOWN in trial.values.values() else by_values.get(values)]
        alike = [place for place in found if place is not None]
        return own[min(alike)] if alike else repr([trial.values[axis] for axis in results.axes])

    return [own.get(place) or likely(trial) for place, trial in enumerate(results.trials)]


def _words(trial: TrialResult) -> frozenset[str]:
    """The overrides that it was called with, but for its seed."""
    return frozenset(word for word in trial.record["overrides"] if not word.startswith("seed="))


def sign(mode: str) -> int:
    """By which a score is multiplied so that the least is the best."""
    return 1 if mode == "min" else -1


def _level(contenders: Sequence[Arm]) -> float:
    return 1 - (1 - LEVEL) / max(1, len(contenders) - 1)


def _compared(arms: list[Arm]) -> list[Arm]:
    """The arms with their paired difference to the arm that each is held against; the first arm of an environment that
    has a result is held against none. A difference counts at the level at which all of the page hold together with 95%
    (Bonferroni), as in the answer above the table."""
    first = {arm.environment: arm for arm in reversed(arms) if arm.scores}
    scored = {tuple(arm.values.values()): arm for arm in reversed(arms) if arm.scores}
    result = []
    for arm in arms:
        other = _against(arm, scored) or (None if arm.results.about.get("compare") else first.get(arm.environment))
        other = None if other is arm or first.get(arm.environment) is arm else other
        difference = paired(arm.by_seed, other.by_seed) if other else None
        is_first = len(arms) > 1 and first.get(arm.environment) is arm
        result.append(replace(arm, baseline=is_first, difference=difference, against=other if difference else None))
    level = 1 - (1 - LEVEL) / max(1, together(arms[0].results, result) if arms else 1)
    return [replace(arm, difference=arm.difference and replace(arm.difference, level=level)) for arm in result]


def _against(arm: Arm, scored: Mapping[tuple[str, ...], Arm]) -> Arm | None:
    """Like with like: the scored arm of the same environment that has the first value of one axis and is equal on all
    others, of the first such axis; None where there is none. So nf4 with r = 8 is held against none with r = 8, and
    none with r = 8 against none with r = 2. Where axes move together, or are there in some trials only, several axes
    have their first value, or none: as few as can be. ``sweep.compare`` names the only axes to go along."""
    compared = arm.results.compared
    for axis, labels in arm.results.axes.items():
        if axis == environments.AXIS or arm.values[axis] == labels[0] or axis not in compared:
            continue
        values = {**arm.values, axis: labels[0]}
        if (other := scored.get(tuple(values.values()))) is not None:
            return other
    if len(scored) > MOST_SEARCHED:
        return None
    alike = [other for other in reversed([*scored.values()]) if other.environment == arm.environment]
    near = {changed: other for other in alike if (changed := _changed(arm, other))}
    return near[min(near, key=lambda changed: (len(changed), changed))] if near else None


def _changed(arm: Arm, other: Arm) -> tuple[int, ...]:
    """The places of the axes on which ``other`` differs, where it has their first values or lacks them; else empty."""
    axes = arm.results.axes
    changed = [(place, axis) for place, axis in enumerate(axes) if arm.values[axis] != other.values[axis]]
    compared = arm.results.compared
    near = all(axis in compared and other.values[axis] in (axes[axis][0], UNKNOWN) for _, axis in changed)
    return tuple(place for place, _ in changed) if near else ()


def _mark_best(arms: list[Arm], mode: str) -> list[Arm]:
    """The arm whose paired interval against every other arm excludes 0 on the better side, if there is one.

    The intervals are Bonferroni's: an arm that is no better than the true best must win against that one by chance,
    and any of the others might. What ran in another environment cannot be told apart, so then there is none.
    """
    scored = [arm for arm in arms if arm.scores]
    if len(scored) < 2 or len({arm.environment for arm in scored}) > 1:
        return arms
    level = _level(scored)

    def beats(arm: Arm, other: Arm) -> bool:
        gap = paired(arm.by_seed, other.by_seed, level)
        return gap is not None and gap.verdict(mode) == "better"

    candidate = scored[0]
    for other in scored[1:]:  # nothing beats the best one, so it is the last that is left
        if not beats(candidate, other):
            candidate = other
    best = all(beats(candidate, other) for other in scored if other is not candidate)
    return [replace(arm, best=best and arm is candidate) for arm in arms]

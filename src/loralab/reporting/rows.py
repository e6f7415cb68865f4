"""Trials to rows: one per configuration, averaged over its seeds and nothing else; and who is compared with whom."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loralab.analysis.paired import LEVEL, Difference, paired, replicates
from loralab.reporting import environments
from loralab.reporting.axes import UNKNOWN, identity, is_number, lookup
from loralab.reporting.gather import Pack, Study, Trial, pack_of, score
from loralab.reporting.sets import comparable


@dataclass(frozen=True)
class Row:
    """One configuration in one environment. ``by_seed``: the metric of each completed seed; ``best``: separated from
    every other arm by its paired intervals; ``difference``: to the baseline row of the same environment."""

    values: dict[str, str]
    trials: list[Trial]
    by_seed: dict[str, float]
    best: bool = False
    baseline: bool = False
    difference: Difference | None = None

    @property
    def scores(self) -> list[float]:
        return list(self.by_seed.values())

    @property
    def n(self) -> int:
        """Independent scores: 1 where no seed changes the score."""
        return replicates(self.by_seed)

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.scores) if self.n > 1 else next(iter(self.scores), None)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds (n - 1); None for fewer than two."""
        return statistics.stdev(self.scores) if self.n > 1 else None

    @property
    def ok(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.ok]

    @property
    def packs(self) -> set[Pack | None]:
        """Of the completed seeds; None stands for those that ran alone."""
        return {pack_of(trial.record) for trial in self.ok}

    @property
    def steps(self) -> list[int]:
        """Optimizer steps made, of each completed seed, in order."""
        found = [lookup(trial.record, "time.steps") for trial in self.ok]
        return sorted(int(value) for value in found if is_number(value))

    @property
    def stopped(self) -> int:
        """Completed seeds that early stopping ended."""
        return sum(bool(trial.record.get("stopped_early")) for trial in self.ok)

    @property
    def environment(self) -> str:
        return self.values.get(environments.AXIS, "")

    def average(self, key: str) -> float | None:
        """Mean of a record's number over the completed seeds, for example ``adapter.bytes``."""
        found = self.numbers(key)
        return statistics.fmean(found) if found else None

    def largest(self, key: str) -> float | None:
        """The largest over the seeds: what a machine must have for all of them."""
        return max(self.numbers(key), default=None)

    def measured(self, name: str) -> float | None:
        """Mean of another metric over the completed seeds."""
        found = [value for trial in self.trials if (value := score(trial.record, name)) is not None]
        return statistics.fmean(found) if found else None

    def numbers(self, key: str) -> list[float]:
        """A record's number of each completed seed that has it."""
        found = [lookup(trial.record, key) for trial in self.ok]
        return [float(value) for value in found if is_number(value)]


Table = tuple[Study, list[Row]]


def tables(study: Study) -> list[Table]:
    """A table for each set of trials that may be compared."""
    return [(part, rows(part)) for part in comparable(study)]


def rows(study: Study) -> list[Row]:
    """One row per configuration in the order of the axes: first the baseline, the first value of every axis."""
    groups: dict[str, list[Trial]] = {}
    for trial in study.trials:
        groups.setdefault(_group(study, trial), []).append(trial)
    found = [_row(study, trials) for trials in groups.values()]
    found.sort(key=lambda row: [_position(labels, row.values[axis]) for axis, labels in study.axes.items()])
    return _mark_best(_compared(found), study.mode)


def contenders(found: Sequence[Row]) -> list[Row]:
    """The rows among which one could be the best."""
    return [row for row in found if row.scores]


def level(found: Sequence[Row]) -> float:
    """Of each interval by which an arm is told from the others, so that all of them hold together with 95%."""
    return 1 - (1 - LEVEL) / max(1, len(contenders(found)) - 1)


def _group(study: Study, trial: Trial) -> str:
    if trial.record["config"]:
        return trial.values.get(environments.AXIS, "") + identity(trial.record)
    alike = (other for other in study.trials if other.record["config"] and _same_place(study, trial, other))
    twin = next(alike, None)
    return _group(study, twin) if twin else repr([trial.values[axis] for axis in study.axes])


def _same_place(study: Study, one: Trial, other: Trial) -> bool:
    """Where ``one`` would have run is not known."""
    axes = [axis for axis in study.axes if axis != environments.AXIS]
    return UNKNOWN not in one.values.values() and all(one.values[axis] == other.values[axis] for axis in axes)


def _row(study: Study, trials: list[Trial]) -> Row:
    by_seed = {t.seed: value for t in trials if t.ok and (value := score(t.record, study.metric)) is not None}
    head = next((trial for trial in trials if trial.ok), trials[0])
    return Row({axis: head.values[axis] for axis in study.axes}, trials, by_seed)


def _position(labels: list[str], value: str) -> int:
    return labels.index(value) if value in labels else len(labels)


def _compared(found: list[Row]) -> list[Row]:
    """Every row less the first of its environment that has a result, seed by seed."""
    first: dict[str, Row] = {}
    for row in contenders(found):
        first.setdefault(row.environment, row)
    many = len(found) > 1
    return [_against(row, first.get(row.environment), many) for row in found]


def _against(row: Row, base: Row | None, many: bool) -> Row:
    if row is base:
        return replace(row, baseline=many)
    return replace(row, difference=paired(row.by_seed, base.by_seed)) if base else row


def _mark_best(found: list[Row], mode: str) -> list[Row]:
    """The arm whose paired interval against every other arm excludes 0 on the better side, if there is one.

    The intervals are Bonferroni's: an arm that is no better than the true best must win against that one by chance,
    and any of the others might. What ran in another environment cannot be told apart, so then there is none.
    """
    among = contenders(found)
    if len(among) < 2 or len({row.environment for row in among}) > 1:
        return found
    sign, each = (1 if mode == "min" else -1), level(found)

    def beats(row: Row, other: Row) -> bool:
        one = paired(row.by_seed, other.by_seed, each)
        return one is not None and one.reach is not None and sign * one.mean + one.reach < 0

    return [
        replace(row, best=bool(row.scores) and all(beats(row, other) for other in among if other is not row))
        for row in found
    ]

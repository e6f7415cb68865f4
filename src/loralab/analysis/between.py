"""Two sweeps held against each other: rows of equal values, differences over the seeds that both have."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from loralab.analysis import environments
from loralab.analysis.arms import Arm, Comparison, comparisons
from loralab.analysis.comparable import apart, comparable
from loralab.analysis.paired import LEVEL, Difference, paired
from loralab.analysis.results import SweepResults, assemble
from loralab.analysis.trials import TrialResult
from loralab.analysis.tuning import TEST
from loralab.analysis.values import UNSAID, aside, axis_value, canonical, flatten, label, short_names
from loralab.errors import ArtifactError

SIDES = ("A", "B")


@dataclass(frozen=True)
class Pair:
    """A row of A and a row of B with the same values; ``difference``: B less A, None where they share no seed."""

    one: Arm
    other: Arm
    difference: Difference | None

    @property
    def name(self) -> str:
        """The one name that both have, or both."""
        names = dict.fromkeys((self.one.name, self.other.name))
        return next(iter(names)) if len(names) == 1 else " / ".join(map(": ".join, zip(SIDES, names, strict=True)))

    @property
    def verdict(self) -> str:
        """``better`` or ``worse``: B than A, where the interval excludes 0 beside all others; else empty."""
        return self.difference.verdict(self.one.results.mode) if self.difference else ""


@dataclass(frozen=True)
class Between:
    """``sides``: the comparisons of A and of B; ``axes``: by whose values rows are matched; ``pairs``: in the order of
    A's table."""

    sides: tuple[Comparison, Comparison]
    axes: list[str]
    pairs: list[Pair]

    @property
    def results(self) -> SweepResults:
        """Of A, whose metric and direction B's are."""
        return self.sides[0].results

    @property
    def level(self) -> float:
        """At which each difference counts, so that all of them hold together with 95% (Bonferroni)."""
        return next((pair.difference.level for pair in self.pairs if pair.difference), LEVEL)

    @cached_property
    def alone(self) -> list[list[Arm]]:
        """Of each side, the rows with a score that have no partner."""
        matched = {id(arm) for pair in self.pairs for arm in (pair.one, pair.other)}
        return [[arm for arm in side.contenders if id(arm) not in matched] for side in self.sides]

    @cached_property
    def versions(self) -> list[dict[str, int]]:
        """Of each side {``loralab 0.1.0, torch 2.13.0``: completed trials}, with whatever else of versions and hardware
        is not the same everywhere."""
        found = [[environments.environment(trial.record) for trial in _completed(side)] for side in self.sides]
        every = [one for side in found for one in side]
        keys = [key for key in dict.fromkeys(key for one in every for key in one) if _differs(key, every)]
        shown = list(dict.fromkeys(["loralab", "torch", *keys]))
        return [dict(Counter(environments.told(one, shown) for one in side)) for side in found]

    @property
    def one_environment(self) -> bool:
        """Whether all trials of both were made with the same versions on the same hardware."""
        return len({text for side in self.versions for text in side}) == 1

    @cached_property
    def settings(self) -> dict[str, tuple[str, str]]:
        """{setting: (A's value, B's)} of settings that are one value in all of A and another in all of B; they are what
        the differences are of, besides the versions."""
        flat = [[_settings(trial) for trial in _completed(side)] for side in self.sides]
        keys = dict.fromkeys(key for side in flat for settings in side for key in settings)
        values = {
            key: [{canonical(settings.get(key)): settings.get(key) for settings in side} for side in flat]
            for key in keys
        }
        return {
            key: (label(next(iter(one.values()))), label(next(iter(other.values()))))
            for key, (one, other) in values.items()
            if len(one) == len(other) == 1 and set(one) != set(other)
        }

    def shared(self, key: str) -> list[str]:
        """Of each side what its completed trials have under a key of the record, such as ``base.fingerprint``."""
        return [" | ".join(dict.fromkeys(str(trial.get(key)) for trial in _completed(side))) for side in self.sides]


def between(one: SweepResults, other: SweepResults) -> Between:
    """The rows of two sweeps with equal values, each of a tuned sweep at its own best. Raises ArtifactError where their
    scores do not mean the same, or no row of one has the values of a row of the other."""
    sides = (_only(one), _only(other))
    _refuse_other_scores(sides)
    axes = _matched(sides)
    keyed = [[(_key(arm, axes), arm) for arm in side.contenders] for side in sides]
    pairs = [
        Pair(arm, partner, paired(partner.by_seed, arm.by_seed))
        for key, arm in keyed[0]
        for partner_key, partner in keyed[1]
        if key == partner_key
    ]
    if not pairs:
        names = ", ".join(short_names(axes).values())
        raise ArtifactError(
            f"no row of {one.folder} has the values of a row of {other.folder} on {names}; "
            + "; ".join(f"{side.results.folder} has {_values(side, axes)}" for side in sides)
        )
    level = 1 - (1 - LEVEL) / max(1, sum(pair.difference is not None for pair in pairs))
    counted = [replace(pair, difference=pair.difference and replace(pair.difference, level=level)) for pair in pairs]
    return Between(sides, axes, counted)


def _only(results: SweepResults) -> Comparison:
    found = comparisons(results)
    if len(found) > 1:
        reason = apart([comparison.results for comparison in found]).rstrip(".")
        raise ArtifactError(f"{results.folder} is no one table, so it is compared with no other: {reason}")
    if not found[0].contenders:
        raise ArtifactError(
            f"{results.folder}: no trial has a {found[0].results.metric}, so there is nothing to compare"
        )
    return found[0]


def _refuse_other_scores(sides: tuple[Comparison, Comparison]) -> None:
    """Raises ArtifactError where metric, data or base of the two do not compare, as within one sweep."""
    one, other = (side.results for side in sides)
    first = f"{one.folder} and {other.folder} do not compare"
    if (one.metric, one.mode) != (other.metric, other.mode):
        told = " and ".join(f"{part.metric} ({part.better} is better)" for part in (one, other))
        tuned = [str(side.results.folder) for side in sides if side.tuned is not None]
        why = f"; {tuned[0]} is tuned, and scored on the test split" if len(tuned) == 1 else ""
        raise ArtifactError(f"{first}: they are scored by {told}{why}")
    sets = comparable(assemble(one.folder, {**one.about, "axes": {}}, [t for side in sides for t in _completed(side)]))
    if len(sets) > 1:
        raise ArtifactError(f"{first}: {apart(sets).partition(': ')[2].rstrip('.')}")
    rows = [{trial.get("data.fingerprint") for trial in _completed(side)} for side in sides]
    if one.metric.startswith(TEST) and rows[0] != rows[1]:
        marks = " and ".join(" | ".join(sorted(map(str, found))) for found in rows)
        raise ArtifactError(f"{first}: {one.metric} is of the rows of a test split, and the data differ ({marks})")


def _completed(side: Comparison) -> list[TrialResult]:
    return [trial for arm in side.contenders for trial in arm.ok]


def _matched(sides: tuple[Comparison, Comparison]) -> list[str]:
    """The axes that both vary, and those that one varies and the other has at one of the same values."""
    axes = dict.fromkeys(axis for side in sides for axis in side.results.moving())
    found = []
    for axis in axes:
        values = [{_value(arm, axis) for arm in side.contenders} for side in sides]
        if min(map(len, values)) > 1 or values[0] & values[1]:
            found.append(axis)
    return found


def _key(arm: Arm, axes: Sequence[str]) -> tuple[str, ...]:
    return tuple(_value(arm, axis) for axis in axes)


def _value(arm: Arm, axis: str) -> str:
    return canonical(axis_value(arm.ok[0].record, axis))


def _values(side: Comparison, axes: Sequence[str]) -> str:
    rows = dict.fromkeys(
        ", ".join(f"{name} = {_text(arm, axis)}" for axis, name in short_names(axes).items()) for arm in side.contenders
    )
    return " | ".join([*list(rows)[:5], *(["..."] if len(rows) > 5 else [])])


def _text(arm: Arm, axis: str) -> str:
    value = axis_value(arm.ok[0].record, axis)
    return "-" if value is UNSAID else label(value)


def _settings(trial: TrialResult) -> dict[str, Any]:
    found = {**flatten(trial.record["config"]), **trial.record["choices"]}
    return {key: value for key, value in found.items() if not aside(key)}


def _differs(key: str, every: Sequence[environments.Environment]) -> bool:
    return len({canonical(one.get(key)) for one in every}) > 1

"""Which arms a claim speaks of: those that it names, in each setting of the axes that it does not name."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loralab.analysis import environments
from loralab.analysis.arms import Arm, Comparison
from loralab.analysis.results import SweepResults
from loralab.analysis.values import UNKNOWN, UNSAID, axis_value, is_number
from loralab.config.claims import FIRST, Chosen, Claim, as_number, is_of_pack, key_of
from loralab.errors import ConfigError, nearest

NOT_MEASURED = "not measured here"


@dataclass(frozen=True)
class Matched:
    """``arms``: as many as the claim names, or all those along its axis in the order of its values; ``setting``: the
    labels of the axes that it does not name."""

    arms: tuple[Arm, ...]
    setting: str


@dataclass(frozen=True)
class Unmatched:
    """Why a claim has no arms: ``verdict`` is not comparable or cannot tell."""

    verdict: str
    why: str


def matched(results: SweepResults, comparisons: Sequence[Comparison], claim: Claim) -> list[Matched] | Unmatched:
    """The arms with a completed trial of which ``claim`` says something, once for each setting. Raises ConfigError
    where it names an axis that no trial has."""
    if claim.axis:
        axis, where = axis_named(results, claim.axis), _chosen(results, claim.where, FIRST)
        groups = [one for each in comparisons for one in _groups(each.arms, axis, where, _named(results, axis, *where))]
        found = [group for group in groups if len(group.arms) > 1]
        return found or Unmatched("not comparable", f"fewer than two values of {claim.axis} were measured here")
    first = first_axis(results, claim)
    sides = [_chosen(results, {**claim.where, **arm}, first) for arm in claim.arms]
    if len(sides) > 1 and sides[0].keys() != sides[1].keys():
        raise ConfigError(claim.one_sided(sides[0].keys() ^ sides[1].keys()))
    named = _named(results, *sides[0])
    return [one for each in comparisons for one in _sets(each.arms, sides, named)] or _why_none(
        comparisons, claim, sides
    )


def axis_named(results: SweepResults, name: str) -> str:
    """The full name of an axis, which may be given as the table has it; of one with a single value here, that of the
    setting. Raises ConfigError where no trial has it."""
    full = {short: axis for axis, short in results.short.items()}
    if name in results.axes or name in full:
        return full.get(name, name)
    declared = [key for key in _declared(results) if name in (key, key.rpartition(".")[2])]
    if declared:
        return declared[0]
    if all(axis_value(trial.record, name) is UNSAID for trial in results.trials):
        raise ConfigError(f"there is no axis {name}; {nearest(name, results.axes)}")
    return name


def scores(arm: Arm, metric: str | None) -> dict[str, float]:
    """{seed: number} over completed trials; of the sweep's metric where ``metric`` is None."""
    if metric is None:
        return arm.by_seed
    if "/" in metric:
        return {trial.seed: value for trial in arm.ok if (value := trial.score(metric)) is not None}
    return {trial.seed: float(value) for trial in arm.ok if is_number(value := trial.get(metric))}


def of_pack(arms: Sequence[Arm], metric: str | None) -> bool:
    """Whether the numbers are of several trials together, which compares with nothing."""
    return metric is not None and is_of_pack(metric) and any(arm.packs != {None} for arm in arms)


def value_of(arm: Arm, axis: str) -> str:
    """The arm's value on an axis, in one spelling."""
    if axis in arm.values:
        return key_of(arm.values[axis])
    value = axis_value((arm.ok or arm.trials)[0].record, axis)
    return UNKNOWN if value is UNSAID else key_of(value)


def _chosen(results: SweepResults, written: Chosen, first: str) -> Chosen:
    """{full name of the axis: value}; ``first``: the axis of a value by itself."""
    return {first if axis == FIRST else axis_named(results, axis): value for axis, value in written.items()}


def first_axis(results: SweepResults, claim: Claim) -> str:
    """The sweep's first axis, by which arms are named, though the command line may have left one of its values.

    sweep.json has it as ``named_by``. Without, it is the first axis that there is or, where that has none of the values
    of the claim, a setting that has one of them in all trials."""
    if isinstance(named_by := results.about.get("named_by"), str):
        return named_by
    axes = list(results.axes)
    values = {arm[FIRST] for arm in claim.arms if FIRST in arm}
    known = {axis: {key_of(label) for label in results.axes[axis]} for axis in axes[:1]}
    for key in (key for key in _declared(results) if key not in axes):
        known[key] = {key_of(axis_value(trial.record, key)) for trial in results.trials}
    return next((axis for axis, having in known.items() if values & having), (axes or [""])[0])


def _declared(results: SweepResults) -> list[str]:
    """What the trials were called with, the seed aside."""
    words = [word.lstrip("+~").partition("=")[0] for trial in results.trials[:1] for word in trial.record["overrides"]]
    return [key for key in dict.fromkeys(words) if key not in ("seed", "sweeps")]


def _named(results: SweepResults, *axes: str) -> set[str]:
    """The axes, with those that move with them."""
    leaders = {results.led.get(axis, axis) for axis in axes}
    return {*axes, *(axis for axis in results.axes if results.led.get(axis, axis) in leaders)}


def _matches(arm: Arm, chosen: Chosen) -> bool:
    return all(value_of(arm, axis) == value for axis, value in chosen.items())


def _sets(arms: Sequence[Arm], sides: Sequence[Chosen], named: set[str]) -> Iterator[Matched]:
    """Arms that the sides name, and whose other axes are equal, or lacking in one of them."""
    measured = [arm for arm in arms if arm.ok]
    left, *right = [[arm for arm in measured if _matches(arm, chosen)] for chosen in sides]
    for arm in left:
        if not right:
            yield Matched((arm,), _setting(arm, named))
        for other in right[0] if right else ():
            if other is not arm and _alike(arm, other, named):
                yield Matched((arm, other), _setting(arm, named, other))


def _groups(arms: Sequence[Arm], axis: str, where: Chosen, named: set[str]) -> list[Matched]:
    """The arms with each value of an axis whose other axes are equal."""
    groups: dict[str, dict[str, Arm]] = {}
    for arm in arms:
        if arm.ok and _matches(arm, where) and value_of(arm, axis) != UNKNOWN:
            setting = repr([text for name, text in arm.values.items() if name not in named])
            groups.setdefault(setting, {}).setdefault(value_of(arm, axis), arm)
    return [Matched(_in_order(group), _setting(next(iter(group.values())), named)) for group in groups.values()]


def _in_order(group: dict[str, Arm]) -> tuple[Arm, ...]:
    """By size where the values are numbers, else as the axis has them."""
    numbers = {value: as_number(value) for value in group}
    known = {value: number for value, number in numbers.items() if number is not None}
    return tuple(
        group[value] for value in (sorted(known, key=known.__getitem__) if len(known) == len(group) else group)
    )


def _alike(arm: Arm, other: Arm, named: set[str]) -> bool:
    settings = [(text, other.values.get(axis, UNKNOWN)) for axis, text in arm.values.items() if axis not in named]
    return all(one == two or UNKNOWN in (one, two) for one, two in settings)


def _setting(arm: Arm, named: set[str], other: Arm | None = None) -> str:
    """``r = 8, double_quant = true``; a value that the arm lacks is the other's."""
    axes, short = arm.results.axes, arm.results.short
    known = {**(other.values if other else {}), **{a: text for a, text in arm.values.items() if text != UNKNOWN}}
    others = [(axis, known.get(axis, UNKNOWN)) for axis in axes if axis not in named and len(axes[axis]) > 1]
    return ", ".join(f"{short[axis]} = {text}" for axis, text in others if text != UNKNOWN)


def _why_none(comparisons: Sequence[Comparison], claim: Claim, sides: Sequence[Chosen]) -> Unmatched:
    arms = [arm for comparison in comparisons for arm in comparison.arms]
    found = [[arm for arm in arms if _matches(arm, chosen)] for chosen in sides]
    names = [" & ".join(f"{axis}={value}" if axis else value for axis, value in arm.items()) for arm in claim.arms]
    if missing := [name for name, these in zip(names, found, strict=True) if not these]:
        return Unmatched("not comparable", f"{' and '.join(missing)} {NOT_MEASURED}")
    scored = [[arm for arm in these if arm.ok] for these in found]
    for name, these, ok in zip(names, found, scored, strict=True):
        if not ok:
            statuses = ", ".join(dict.fromkeys(trial.status for arm in these for trial in arm.trials))
            return Unmatched("cannot tell", f"{name} has no completed trial ({statuses})")
    one, other = scored[0][0], scored[-1][0]
    if one.environment != other.environment:
        return Unmatched("not comparable", f"measured in other environments; {environments.COMPARED}")
    return Unmatched("not comparable", f"{one.name} and {names[-1]} stand in different tables or settings")

"""Which value of a tuned setting an arm is compared at, and which to try next where the best lies at the grid's edge.

An arm's best value is that with the best mean of the validation metric over seeds. The least of several noisy means is
lower than what it is a mean of, so that mean is no score of the arm: the arm is scored on other data, the test split.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Setting = tuple[str, ...]  # a value of each tuned axis, as it is written
Scores = Mapping[Setting, Mapping[str, float | None]]  # {setting: {seed: validation metric; None: not completed}}


@dataclass(frozen=True)
class Choice:
    """``setting``: the best one, None where no trial is completed; ``means``: over ``seeds``, of the settings that have
    all of them; ``complete``: these are all seeds of the arm. ``edges``: (place of an axis, -1 or 1) where ``setting``
    has the least or the greatest value tried."""

    setting: Setting | None
    means: Mapping[Setting, float]
    seeds: tuple[str, ...]
    complete: bool
    edges: tuple[tuple[int, int], ...] = ()


def choose(scores: Scores, mode: str) -> Choice:
    """The best setting of one arm; ``mode``: min or max. Of equal means the least setting's, in whatever order
    ``scores`` has them.

    A setting that lacks a seed, as one that diverged, is not chosen while another has all of them; where none has,
    those with the most compare over the seeds that they share.
    """
    wanted = list(dict.fromkeys(seed for by_seed in scores.values() for seed in by_seed))
    done = {
        setting: {seed for seed, value in by_seed.items() if value is not None and math.isfinite(value)}
        for setting, by_seed in scores.items()
    }
    most = max(map(len, done.values()), default=0)
    if not most:
        return Choice(None, {}, (), complete=False)
    fullest = [setting for setting, seeds in done.items() if len(seeds) == most]
    shared = [seed for seed in wanted if all(seed in done[setting] for setting in fullest)]
    if not shared:  # the fullest have no seed in common: the first of them is as good a guess as any
        fullest = fullest[:1]
        shared = [seed for seed in wanted if seed in done[fullest[0]]]
    means = {setting: statistics.fmean(scores[setting][seed] or 0.0 for seed in shared) for setting in fullest}
    best = (min if mode == "min" else max)(sorted(means, key=_rank), key=means.__getitem__)
    return Choice(best, means, tuple(shared), most == len(wanted), _edges(best, list(scores)))


def following(choice: Choice, tried: Sequence[Setting], grid: Sequence[Setting], extend: int) -> list[Setting]:
    """The settings to try next: beyond each edge that ``choice`` lies at, by the step of the first ``grid``, at most
    ``extend`` values on a side. Empty where the choice lies inside."""
    if choice.setting is None:
        return []
    found = []
    for place, side in choice.edges:
        ends = sorted(float(setting[place]) for setting in grid if _is_number(setting[place]))
        end, before = (ends[-1], _before(ends[::-1])) if side > 0 else (ends[0], _before(ends))
        column = {float(setting[place]) for setting in tried if _is_number(setting[place])}
        beyond = [value for value in column if (value - end) * side > 0]
        if before is None or len(beyond) >= extend:
            continue
        last = float(choice.setting[place])
        value = last * end / before if min(ends) > 0 else last + end - before
        if value < 0 <= min(ends):  # what begins at 0, as a dropout, has nothing below it
            continue
        found.append((*choice.setting[:place], f"{value:.6g}", *choice.setting[place + 1 :]))
    return [setting for setting in found if setting not in tried]


def beside(setting: Setting, tried: Sequence[Setting], count: int) -> list[Setting]:
    """The next ``count`` of ``tried`` on either side of ``setting``, along each axis of numbers."""
    found = []
    for place, own in enumerate(setting):
        others = [
            s
            for s in tried
            if s != setting and (*s[:place], *s[place + 1 :]) == (*setting[:place], *setting[place + 1 :])
        ]
        if not all(_is_number(s[place]) for s in [setting, *others]):
            continue
        for side in (-1, 1):
            there = [s for s in others if (float(s[place]) - float(own)) * side > 0]
            found += sorted(there, key=lambda s: abs(float(s[place]) - float(own)))[:count]
    return found


def _before(ends: Sequence[float]) -> float | None:
    """The value next to the first one; None where all are equal."""
    return next((value for value in ends if value != ends[0]), None)


def _edges(best: Setting, tried: Sequence[Setting]) -> tuple[tuple[int, int], ...]:
    found = []
    for place, own in enumerate(best):
        column = {s[place] for s in tried if (*s[:place], *s[place + 1 :]) == (*best[:place], *best[place + 1 :])}
        if len(column) < 2 or not all(map(_is_number, column)):
            continue
        values = sorted(map(float, column))
        if len({values[0], values[-1]}) == 2 and float(own) in (values[0], values[-1]):
            found.append((place, 1 if float(own) == values[-1] else -1))
    return tuple(found)


def _rank(setting: Setting) -> tuple[tuple[float, str], ...]:
    """Its place among settings: numbers by their size, before texts."""
    return tuple((float(text), "") if _is_number(text) else (math.inf, text) for text in setting)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False

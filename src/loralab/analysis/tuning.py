"""The arms of a sweep that tunes (``sweep.tune``), each at its own best value, chosen by the validation split."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from loralab.analysis.results import SweepResults
from loralab.analysis.steps import saved
from loralab.analysis.trials import PRUNED, TrialResult
from loralab.analysis.values import UNKNOWN
from loralab.numerics.scale import scale as of_settings
from loralab.numerics.tuning import Choice, Scores, Setting, choose

VALIDATION, TEST = "val/", "test/"
Key = tuple[str, ...]  # an arm's labels on the axes that are not tuned


@dataclass(frozen=True)
class Tuned:
    """``results``: of the trials that were chosen, scored on the test split, without the tuned ``axes``; ``whole``: of
    all trials, scored on the validation split. ``scores`` and ``choices``: of each arm."""

    results: SweepResults
    whole: SweepResults
    axes: list[str]
    scores: dict[Key, Scores] = field(default_factory=dict)
    choices: dict[Key, Choice] = field(default_factory=dict)

    @cached_property
    def names(self) -> list[str]:
        """The tuned axes as a table calls them."""
        return [self.whole.short[axis] for axis in self.axes]

    def choice(self, values: Mapping[str, str]) -> Choice:
        """Of the arm with these labels."""
        return self.choices[tuple(values[axis] for axis in self.results.axes)]

    def text(self, values: Mapping[str, str], place: int, own: str) -> str:
        """The chosen value of the tuned axis at ``place``, and whether none was tried beyond it; ``own``: where none
        could be chosen."""
        choice = self.choice(values)
        if choice.setting is None:
            return own
        side = dict(choice.edges).get(place)
        return choice.setting[place] + {None: "", -1: " (least)", 1: " (greatest)"}[side]

    def sentences(self) -> Iterator[str]:
        """How the values were chosen, and what there is to know of the choices."""
        names, count = " and ".join(self.names), len(self.choices)
        tried = sorted({len(scores) for scores in self.scores.values()})
        values = " to ".join(str(number) for number in dict.fromkeys((tried[0], tried[-1])))
        yield (
            f"Each row is at its own best {names} of {values} tried, chosen by the mean {self.whole.metric} over seeds;"
            f" {self.results.metric} is of the test split, on which nothing was chosen"
        )
        at_edge = [key for key, choice in self.choices.items() if choice.edges]
        if at_edge:
            yield (
                f"{len(at_edge)} of {count} rows have the least or the greatest {names} that was tried: their best may "
                f"lie beyond ({self._named(at_edge)}); sweep.extend says how far a sweep goes on by itself"
            )
        if early := [trial for trial in self.whole.trials if trial.status == PRUNED]:
            total = len(self.whole.trials)
            yield (
                f"{len(early)} of {total} trials were ended early by sweep.halving, each compared with other {names} of"
                f" its own row alone, at equal steps; {saved(self.whole.trials)}; results.csv has the reason of each"
            )
        lacking = [key for key, choice in self.choices.items() if choice.setting is not None and not choice.complete]
        if lacking:
            yield f"{names} was chosen with seeds missing in {len(lacking)} of {count} rows ({self._named(lacking)})"
        single = [key for key, choice in self.choices.items() if len(choice.seeds) == 1]
        if single:
            yield f"{names} was chosen by a single seed in {len(single)} of {count} rows"
        if any(trial.ok and trial.score(self.results.metric) is None for trial in self.results.trials):
            yield (
                f"Some trials have no {self.results.metric}: they were made with trainer.test=false, or the data has no"
                " test split; the sweep by its name scores them by their adapters"
            )

    def _named(self, keys: list[Key]) -> str:
        names = [
            ", ".join(f"{self.results.short[axis]} = {text}" for axis, text in zip(self.results.axes, key, strict=True))
            for key in keys[:3]
        ]
        return "; ".join([*filter(None, names), *(["..."] if len(keys) > 3 else [])]) or "the only row"


def tuned_axes(results: SweepResults) -> list[str]:
    """The axes of ``sweep.tune`` of which the trials have several values or a value."""
    asked = results.about.get("tune")
    names = [str(name).lstrip("+") for name in asked] if isinstance(asked, Mapping) else []
    return [name for name in names if name in results.axes]


def tuned(results: SweepResults) -> Tuned | None:
    """Every arm of ``results`` at its best value; None for a sweep that tunes nothing."""
    axes = tuned_axes(results)
    if not axes or not results.metric.startswith(VALIDATION):
        return None
    kept = {axis: labels for axis, labels in results.axes.items() if axis not in axes}
    grouped: dict[Key, dict[Setting, list[TrialResult]]] = {}
    for trial in results.trials:
        key, setting = (tuple(trial.values[axis] for axis in names) for names in (kept, axes))
        grouped.setdefault(key, {}).setdefault(setting, []).append(trial)
    scores: dict[Key, Scores] = {
        key: {
            setting: _by_seed(trials, results.metric) for setting, trials in settings.items() if UNKNOWN not in setting
        }
        for key, settings in grouped.items()
    }
    choices = {key: choose(own, results.mode) for key, own in scores.items()}
    chosen = [
        trial
        for key, settings in grouped.items()
        for setting, trials in settings.items()
        if choices[key].setting in (None, setting)
        for trial in trials
    ]
    metric = TEST + results.metric.removeprefix(VALIDATION)
    inside = replace(results, axes=kept, trials=chosen, metric=metric)
    return Tuned(inside, results, axes, scores, choices)


def _by_seed(trials: list[TrialResult], metric: str) -> dict[str, float | None]:
    return {trial.seed: trial.score(metric) for trial in trials}


def scale(trial: TrialResult) -> float | None:
    """What the update of the trial's adapter is multiplied by; None for a method without it."""
    adapter = trial.setting("adapter")
    return of_settings(adapter) if isinstance(adapter, Mapping) else None

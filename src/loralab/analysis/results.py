"""A folder of records read as one: its trials, what varies between them, what each value is called."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loralab.analysis import environments
from loralab.analysis.settings import varying
from loralab.analysis.trials import DAMAGED, PRUNED, Pack, TrialResult, dated, listed_trial, read_trial
from loralab.analysis.values import (
    UNKNOWN,
    Json,
    aside,
    axis_value,
    canonical,
    flatten,
    names,
    short_names,
    sort_key,
    spelled,
)
from loralab.errors import ArtifactError
from loralab.records import record as records
from loralab.records import schema

if TYPE_CHECKING:
    import pandas as pd

Key = tuple[str, ...]


@dataclass(frozen=True)
class SweepResults:
    """``axes``: name -> labels in order, without the seed; ``about``: what else sweep.json says.

    ``repeats``: how often a trial was found again; each counts once. ``conflicts``: where a repetition's score is
    another. ``packs``: of each pack whose members are all here, the tokens/s of all of them together.
    """

    folder: Path
    name: str
    question: str
    axes: dict[str, list[str]]
    trials: list[TrialResult]
    metric: str
    mode: str
    about: Json
    repeats: int = 0
    conflicts: tuple[str, ...] = ()
    packs: Mapping[Pack, float] = field(default_factory=dict)

    @property
    def single(self) -> bool:
        """Whether this is the folder of one run."""
        return [trial.folder for trial in self.trials] == [self.folder]

    @property
    def better(self) -> str:
        return "lower" if self.mode == "min" else "higher"

    @property
    def broken(self) -> list[TrialResult]:
        """Trials that ended without a result, or were never started; not those that the sweep ended early."""
        return [trial for trial in self.trials if not trial.ok and trial.status not in ("running", PRUNED)]

    @cached_property
    def short(self) -> dict[str, str]:
        """The axes' names without their groups, where they are still distinct."""
        return short_names(list(self.axes))

    @cached_property
    def frame(self) -> "pd.DataFrame":
        """A row a trial: trial, folder, status, seed, error, then under dotted names what its record says, its choices,
        its configuration and its metrics. A value that a record lacks is missing."""
        import pandas as pd

        return pd.DataFrame([_columns(trial) for trial in self.trials], dtype=object).infer_objects()

    @property
    def compared(self) -> list[str]:
        """The axes along which rows are held against each other: those of ``sweep.compare``, else all."""
        asked = self.about.get("compare")
        names = [str(name).lstrip("+") for name in asked] if isinstance(asked, list) else []
        return [axis for axis in self.axes if axis in names or not names]

    @cached_property
    def searched(self) -> list[str]:
        """The axes of a search (``hydra/sweeper=optuna``); empty where it is none."""
        search = self.about.get("search")
        space = search.get("space") if isinstance(search, Mapping) else None
        return [axis for axis in self.axes if axis in space] if isinstance(space, Mapping) else []

    def moving(self) -> list[str]:
        """The axes with more than one value, the environment aside."""
        return [axis for axis, labels in self.axes.items() if len(labels) > 1 and axis != environments.AXIS]

    @cached_property
    def led(self) -> dict[str, str]:
        """{axis: the one that it moves with}: of each group of ``sweep.zip`` the first leads, whose value says the
        others', and an axis leads those that were written as an interpolation of it. Where its value does not say
        theirs, as with a value given twice, none of them is led."""
        led: dict[str, str] = {}
        for group in [*_groups(self.about.get("zip")), *_interpolated(self.about.get("overrides"), self.axes)]:
            first, *others = (name.lstrip("+") for name in group)
            for other in others if first in self.axes else ():
                pairs = {(t.values[first], t.values[other]) for t in self.trials} if other in self.axes else set()
                if pairs and len({leading for leading, _ in pairs}) == len(pairs):
                    led[other] = first
        return led

    def together(self, axis: str) -> str:
        """``r`` or, where other axes move with it, ``r (and lr with it)``."""
        followers = [self.short[other] for other, leader in self.led.items() if leader == axis]
        return f"{self.short[axis]} (and {', '.join(followers)} with it)" if followers else self.short[axis]

    def count(self, *statuses: str) -> int:
        return sum(trial.status in statuses for trial in self.trials)

    def describe(self, trial: TrialResult) -> str:
        """``quantization=nf4 r=8 seed=1``."""
        return " ".join([*(f"{self.short[axis]}={trial.values[axis]}" for axis in self.axes), f"seed={trial.seed}"])


def _groups(zipped: Any) -> list[list[str]]:
    """The groups of axes of ``sweep.zip``; a single one may be written as one list."""
    listed = zipped if isinstance(zipped, list) else []
    return [listed] if listed and all(isinstance(name, str) for name in listed) else listed


def _interpolated(words: Any, axes: Iterable[str]) -> list[list[str]]:
    """[axis, one that a setting of the command line writes as an interpolation of it, and of no other axis]."""
    settings = [str(word).lstrip("+").partition("=") for word in (words if isinstance(words, list) else [])]
    named = [(key, [axis for axis in axes if f"${{{axis}}}" in value]) for key, _, value in settings]
    return [[found[0], key] for key, found in named if len(found) == 1]


def read_results(folder: Path) -> SweepResults:
    """Read the sweep, the run, or the folder of runs at ``folder``. Raises ArtifactError where nothing can be read."""
    sweep = _sweep(folder)
    listed = [listed_trial(folder, entry) for entry in sweep["trials"]]
    listed = listed or [read_trial(path) for path in records.find(folder)]
    trials, conflicts = _once(dated(listed))
    if not trials:
        raise ArtifactError(
            f"{folder}: nothing to report; looked for {records.SWEEP} there, {records.RESULT} there and below"
        )
    if [(trial.folder, trial.status) for trial in trials] == [(folder, DAMAGED)]:
        raise ArtifactError(trials[0].record["error"])
    axes = {axis: values for axis, values in sweep["axes"].items() if len(trials) + len(values) > 2}
    results = assemble(folder, {**sweep, "axes": axes}, trials)
    return replace(results, repeats=len(listed) - len(trials), conflicts=tuple(conflicts), packs=_rates(trials))


def assemble(folder: Path, sweep: Json, trials: Sequence[TrialResult]) -> SweepResults:
    """The results of ``trials``: the axes of ``sweep``, with its values first, then others that vary."""
    configured = [trial.record for trial in trials if trial.record["config"]]
    declared: dict[str, list[Any]] = {axis: values for axis, values in sweep["axes"].items() if not aside(axis)}
    keys = [*declared, *varying(configured, list(declared))]
    columns = {key: [axis_value(trial.record, key) for trial in trials] for key in [*keys, "seed"]}
    labels = {key: names([*declared.get(key, []), *values]) for key, values in columns.items()}
    axes = {key: _ordered(declared.get(key, []), columns[key], labels[key]) for key in keys}
    texts = {key: [labels[key][canonical(value)] for value in values] for key, values in columns.items()}
    if places := environments.labels([(trial.record, trial.ok) for trial in trials]):
        texts[environments.AXIS], axes[environments.AXIS] = places, list(dict.fromkeys(places))
    labelled = [
        replace(trial, values=dict(zip(texts, own, strict=True)))
        for trial, own in zip(trials, zip(*texts.values(), strict=True), strict=True)
    ]
    metric = _most_common((trial.metric for trial in trials if trial.record["config"]), "val/loss")
    mode = _most_common((trial.mode for trial in trials if trial.record["config"]), "min")
    return SweepResults(folder, sweep["name"], sweep["question"], axes, labelled, metric, mode, sweep)


def _columns(trial: TrialResult) -> Json:
    """A row of the frame; where a setting and a measurement have one name, the setting counts."""
    record = trial.record
    measured = flatten({section: record.get(section) or {} for section in schema.KEYS})
    first = {"trial": record["trial"], "folder": trial.name, "status": trial.status, "seed": record["seed"]}
    settings = {**record["choices"], **flatten(record["config"])}
    return {**first, "error": record["error"], **measured, **settings, **record["metrics"], **first}


def _rates(trials: Sequence[TrialResult]) -> dict[Pack, float]:
    """{pack: tokens/s of all its trials}. A record has its own tokens over the pack's seconds."""
    members: dict[Pack, list[Any]] = {}
    for trial in trials:
        if trial.pack is not None:
            members.setdefault(trial.pack, []).append(trial.get("time.tokens_per_s"))
    return {pack: sum(rates) for pack, rates in members.items() if len(rates) == pack[0] and None not in rates}


def _sweep(folder: Path) -> Json:
    """sweep.json; where it cannot be read, ``damaged`` says why and the records below speak for themselves."""
    blank: Json = {"name": folder.resolve().name, "question": "", "axes": {}, "trials": []}
    if not (folder / records.SWEEP).exists():
        return blank
    try:
        sweep = records.read_sweep(folder)
    except ArtifactError as error:
        if not records.find(folder):
            raise
        return {**blank, "damaged": str(error)}
    listed = {str(axis): texts if isinstance(texts, list) else [texts] for axis, texts in sweep["axes"].items()}
    axes = {
        axis: [spelled(text) if isinstance(text, str) else text for text in texts] for axis, texts in listed.items()
    }
    return {**sweep, "axes": axes}


def _once(listed: Sequence[TrialResult]) -> tuple[list[TrialResult], list[str]]:
    """(each trial once, as its last completed record has it; a message for each pair of records whose scores differ).

    ``seed=0,0`` is one seed, a repetition no second one; on other data, another base or elsewhere it is another trial.
    """
    by_key: dict[Key, TrialResult] = {}
    conflicts = []
    for trial in listed:
        key = _key(trial)
        previous = by_key.get(key)
        if previous is None or trial.ok:
            by_key[key] = trial
        if previous is not None and previous.ok and trial.ok:
            old, new = previous.score(trial.metric), trial.score(trial.metric)
            message = f"{previous.name} and {trial.name} are one trial, yet {trial.metric} is {old} and {new}"
            conflicts += [f"{message}; the latter counts"] if old != new else []
    completed = {_bare_key(trial) for trial in by_key.values() if trial.ok} - {None}
    return [trial for trial in by_key.values() if trial.ok or _bare_key(trial) not in completed], conflicts


def _key(trial: TrialResult) -> Key:
    bare = _bare_key(trial)
    if bare is None:
        return (str(trial.folder),)
    marks = [trial.get(f"{part}.fingerprint") for part in ("data", "base")]
    values = [trial.record["schema"], *marks, environments.environment(trial.record)]
    return (*bare, *map(canonical, values))


def _bare_key(trial: TrialResult) -> Key | None:
    """A key of the configuration, seed and metric, whatever environment it ran in; None without a configuration."""
    if not trial.record["config"]:
        return None
    values = [trial.record["seed"], trial.metric, trial.setting("metric_mode")]
    return (trial.configuration, *map(canonical, values))


def _ordered(declared: Sequence[Any], values: Sequence[Any], labels: Mapping[str, str]) -> list[str]:
    """The labels of an axis: as declared, then what else was seen, numbers first."""
    first = dict.fromkeys(canonical(value) for value in declared)
    others = {canonical(value) for value in values} - set(first) - {UNKNOWN}
    return [labels[key] for key in [*first, *sorted(others, key=sort_key)]]


def _most_common(texts: Iterable[str], default: str) -> str:
    counted = Counter(texts).most_common(1)
    return counted[0][0] if counted else default

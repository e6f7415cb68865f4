"""Which trials compare at all: those whose scores are taken over the same targets, by one metric, on a known base."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from loralab.analysis.results import SweepResults, assemble
from loralab.analysis.trials import TrialResult
from loralab.analysis.values import Json, axis_value, canonical, label, lookup


def comparable(results: SweepResults) -> list[SweepResults]:
    """The results of each set of trials whose scores mean the same: only within one do means compare.

    A loss compares over equal target tokens, whatever the prompts; trials of one configuration whose data or base
    have changed between them are of different sets.
    """
    completed = [trial for trial in results.trials if trial.ok]
    numbers = _sets(_bases(completed)) if completed else []
    if len(set(numbers)) < 2:
        return [results]
    number_of = {trial.folder: number for trial, number in zip(completed, numbers, strict=True)}
    first_of_set = {number: trial for trial, number in reversed(list(zip(completed, numbers, strict=True)))}
    members: dict[int, list[TrialResult]] = {number: [] for number in sorted(first_of_set)}
    for trial in results.trials:
        members[number_of[trial.folder] if trial.ok else _likely(results, trial, first_of_set)].append(trial)
    return [_subset(results, trials) for trials in members.values()]


def subject(results: SweepResults) -> str:
    """What a set is about: ``docstrings f967626fe70ef416, targets 8c0e.., base 91ab.., causal_lm: val/loss``."""
    completed = [trial for trial in results.trials if trial.ok]
    name, data, targets, base = (
        _shared(completed, key) for key in ("data.name", "data.fingerprint", "data.targets", "base.fingerprint")
    )
    about = [" ".join(filter(None, (name, data))) or "data not known"]
    about += [f"{title} {text}" for title, text in (("targets", targets), ("base", base)) if text]
    about += [str(task) for task in [(completed or results.trials)[0].setting("model.task")] if task]
    return f"{', '.join(about)}: {results.metric}"


def apart(sets: Sequence[SweepResults]) -> str:
    """Why there is more than one set; empty where there is one."""
    if len(sets) < 2:
        return ""
    firsts = [next(trial for trial in results.trials if trial.ok) for results in sets]
    completed = [trial for results in sets for trial in results.trials if trial.ok]
    bases = _bases(completed).iloc[[completed.index(trial) for trial in firsts]]
    reasons = "; ".join(_REASONS[key](firsts) for key in _REASONS if bases[key].nunique(dropna=False) > 1)
    return f"{len(sets)} tables, whose numbers cannot be compared: {reasons}."


def _setting(words: str, key: str) -> Callable[[Sequence[TrialResult]], str]:
    return lambda firsts: f"{words} {_listed(label(trial.setting(key)) for trial in firsts)}"


def _changed_words(what: str, mark: str, node: Callable[[Json], Any]) -> Callable[[Sequence[TrialResult]], str]:
    def words(firsts: Sequence[TrialResult]) -> str:
        same = len({canonical(node(trial.record)) for trial in firsts}) == 1
        how = "changed between the runs, though the settings are the same" if same else "differ"
        return f"{what} {how} (fingerprints {_listed(str(trial.get(mark)) for trial in firsts)})"

    return words


def _other_targets(firsts: Sequence[TrialResult]) -> str:
    """Other data, or the same data in other tokens."""
    if len({trial.get("data.fingerprint") for trial in firsts}) > 1:
        return _REASONS["data"](firsts)
    if any(map(_is_of_texts, firsts)):
        return f"the scores are over {_listed(map(_counted, firsts))}"
    lengths = _listed(str(_cut(trial.record)) for trial in firsts)
    tokenizers = _listed(label(trial.setting("model.name_or_path")) for trial in firsts)
    where = f"cut at model.max_length = {lengths}" if "|" in lengths else f"of the tokenizers of {tokenizers}"
    return f"the scores are over other target tokens, {where}: a loss over other tokens is another measure"


def _listed(texts: Iterator[str]) -> str:
    return " | ".join(dict.fromkeys(texts))


def _data(record: Json) -> Any:
    """The settings from which the fingerprint of the rows follows."""
    scoring = ("batch_size", "packing", "generate_rows", "generation", "rouge", "bleu", "forgetting")
    settings = {key: value for key, value in (record["config"].get("data") or {}).items() if key not in scoring}
    return [settings, record["choices"].get("data"), lookup(record["config"], "model.task")]


def _files(record: Json) -> Any:
    return [lookup(record["config"], f"data.{split}") for split in ("train", "validation", "test")]


def _base(record: Json) -> Any:
    """The settings from which the base's fingerprint follows; schema 1 took it of the weights as they were loaded."""
    config = record["config"]
    model = config.get("model") or {}
    if record["schema"] > 1:
        return [model.get(key) for key in ("name_or_path", "revision", "config", "draw")]
    loaded = [config.get("quantization"), config.get("trainer"), record["memory"]["device"]]
    settings = {key: value for key, value in model.items() if key != "max_length"}
    return [1, settings, record["choices"].get("model"), loaded, record["data"]["fingerprint"]]


# What may be rewritten under the same settings: part of the basis, its fingerprint, the settings.
_REWRITTEN = (
    ("data", "data.fingerprint", _data, "the data"),
    ("files", "data.source", _files, "the data files"),
    ("base", "base.fingerprint", _base, "the base's weights"),
)
# Each part of a basis, in the order in which a difference is told.
_REASONS: dict[str, Callable[[Sequence[TrialResult]], str]] = {
    "task": _setting("the task is", "model.task"),
    "metric": _setting("the metric is", "metric"),
    "direction": _setting("better is", "metric_mode"),
    "targets": _other_targets,
    **{key: _changed_words(what, mark, node) for key, mark, node, what in _REWRITTEN},
}


def _subset(results: SweepResults, trials: Sequence[TrialResult]) -> SweepResults:
    """The results of ``trials`` alone, with every axis of ``results``, so that an arm keeps its name."""
    axes: dict[str, list[Any]] = {}
    for axis in results.moving():
        labelled = [trial for label in results.axes[axis] for trial in trials if trial.values[axis] == label]
        axes |= {axis: [axis_value(trial.record, axis) for trial in labelled]} if labelled else {}
    return replace(assemble(results.folder, {**results.about, "axes": axes}, trials), packs=results.packs)


def _bases(trials: Sequence[TrialResult]) -> pd.DataFrame:
    """What each completed trial's score is taken over: a row for each trial, a column for each key of ``_REASONS``.
    Trials of the same sections have one basis, which is looked at once."""
    keys = [_sections(trial) for trial in trials]
    last = list(dict.fromkeys(reversed(keys)))[::-1]
    of_key = dict(zip(keys, trials, strict=True))
    row = {key: number for number, key in enumerate(last)}
    return _distinct_bases([of_key[key] for key in last]).iloc[[row[key] for key in keys]]


def _sections(trial: TrialResult) -> tuple[Any, ...]:
    """Equal for trials of one basis, though not for all of them."""
    record, config = trial.record, trial.record["config"]
    if record["schema"] < 2:
        return (id(record),)
    sections = [config.get("model"), config.get("data"), record["data"], record["base"], record["choices"]]
    return (trial.metric, trial.mode, *map(id, sections))


def _distinct_bases(trials: Sequence[TrialResult]) -> pd.DataFrame:
    targets_of_rows = {_rows(trial.record): targets for trial in trials if (targets := trial.get("data.targets"))}
    bases = pd.DataFrame([_basis(trial, targets_of_rows) for trial in trials])
    for column, key, settings_of, _ in _REWRITTEN:
        fingerprints = pd.Series([trial.get(key) or None for trial in trials], dtype=object)
        settings = [canonical(settings_of(trial.record)) for trial in trials]
        sets = _sets(bases)
        # several fingerprints under the same settings: what they name was rewritten between the runs
        rewritten = fingerprints.groupby([sets, settings]).transform("nunique") > 1
        bases[column] = fingerprints.astype(str).where(rewritten.groupby(sets).transform("any"))
    return bases


def _sets(bases: pd.DataFrame) -> list[int]:
    """Equal numbers for equal rows, counted in their order."""
    return list(bases.groupby(list(bases.columns), dropna=False, sort=False).ngroup())


def _basis(trial: TrialResult, targets_of_rows: Mapping[str, str]) -> Json:
    record, rows = trial.record, _rows(trial.record)
    targets = record["data"].get("targets") or targets_of_rows.get(rows, rows)
    if _is_of_texts(trial):  # of whole texts: no token of theirs is cut
        targets = f"{record['data']['fingerprint']} {_counted(trial)}"
    if trial.metric.endswith(("bits_per_byte", "choice_accuracy")):  # of the text, in whatever tokens
        targets = str(record["data"]["fingerprint"])
    task = str(trial.setting("model.task"))
    return {"task": task, "metric": trial.metric, "direction": trial.mode, "targets": targets}


def _is_of_texts(trial: TrialResult) -> bool:
    return trial.metric.rpartition("/")[2] in ("rouge_l", "bleu", "exact_match", "number_match")


def _counted(trial: TrialResult) -> str:
    """How many generated rows a score is of, and by which words it counts."""
    data, name = trial.record["data"], trial.metric.rpartition("/")[2]
    words = {"rouge_l": data.get("rouge") or "published", "bleu": data.get("bleu")}.get(name)
    rows = f"{lookup(trial.record['config'], 'data.generate_rows')} generated rows"
    return f"{rows}, words as in data.{'rouge' if name == 'rouge_l' else name}={words}" if words else rows


def _rows(record: Json) -> str:
    """A key for the targets of a record without their fingerprint: its rows, its tokenizer and their maximal length."""
    config, data = record["config"], record["data"]
    task = lookup(config, "model.task")
    cut = _cut(record) if data["truncated"] else "whole"
    tokens = [lookup(config, "model.tokenizer") or lookup(config, "model.name_or_path"), cut]
    return canonical([data["fingerprint"], task, *(tokens if task != "sequence_classification" else [])])


def _cut(record: Json) -> Any:
    """Tokens at which rows were cut: as recorded, else as configured."""
    return record["data"].get("max_length") or lookup(record["config"], "model.max_length")


def _likely(results: SweepResults, trial: TrialResult, firsts: Mapping[int, TrialResult]) -> int:
    """The number of the set that a trial without a result would have joined: its data settings are the most alike."""
    keys = [axis for axis in results.axes if axis.split(".")[0] in ("data", "model")]
    return max(firsts, key=lambda key: sum(firsts[key].values[axis] == trial.values[axis] for axis in keys))


def _shared(trials: Sequence[TrialResult], key: str) -> str:
    """The value that all of the trials have; empty where there is none."""
    values = {trial.get(key) for trial in trials}
    return str(values.pop()) if len(values) == 1 and None not in values else ""

"""Which trials compare at all: those whose scores are taken over the same targets, by one metric, on a known base."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from loralab.reporting import environments
from loralab.reporting.axes import Record, axis_value, canonical, label, lookup
from loralab.reporting.gather import Study, Trial, assemble

# What a set is known by, in the order in which a difference is told.
_PARTS = ("task", "metric", "direction", "targets", "data", "files", "base")
Ground = dict[str, str]


def comparable(whole: Study) -> list[Study]:
    """One study for each set of trials whose scores mean the same: only within one do means compare.

    A loss compares over equal target tokens, whatever the prompts; trials of one configuration whose data or base
    have changed between them are of different sets.
    """
    grounds = _grounds([trial for trial in whole.trials if trial.ok])
    heads = {json.dumps(grounds[trial.folder]): trial for trial in reversed(whole.trials) if trial.ok}
    keys = [key for key in dict.fromkeys(map(json.dumps, grounds.values())) if key in heads]
    if len(keys) < 2:
        return [whole]
    places = [json.dumps(grounds[trial.folder]) if trial.ok else _likely(whole, trial, heads) for trial in whole.trials]
    return [_part(whole, [t for t, place in zip(whole.trials, places, strict=True) if place == key]) for key in keys]


def subject(part: Study) -> str:
    """What a set is about: ``docstrings f967626fe70ef416, targets 8c0e.., base 91ab.., causal_lm: val/loss``."""
    head = next((trial.record for trial in part.trials if trial.ok), part.trials[0].record)
    about = [" ".join(_distinct(part, "data.name", "data.fingerprint")) or "data not known"]
    about += [f"{name} {text}" for name, key in _NAMED for text in _distinct(part, key)]
    about += [str(task) for task in (lookup(head["config"], "model.task"),) if task]
    return f"{', '.join(about)}: {part.metric}"


_NAMED = (("targets", "data.targets"), ("base", "base.fingerprint"))


def apart(parts: Sequence[Study]) -> str:
    """Why there is more than one table; empty where there is one."""
    if len(parts) < 2:
        return ""
    heads = [next(trial for trial in part.trials if trial.ok) for part in parts]
    grounds = _grounds([trial for part in parts for trial in part.trials if trial.ok])
    mine = [grounds[head.folder] for head in heads]
    differ = [key for key in _PARTS if len({ground.get(key) for ground in mine}) > 1]
    reasons = "; ".join(_REASONS[key](heads) for key in differ)
    return f"{len(parts)} tables, whose numbers cannot be compared: {reasons}."


def _other_targets(heads: Sequence[Trial]) -> str:
    """Other data, or the same data in other tokens."""
    if len(_marks(heads, "data.fingerprint")) > 1:
        return _changed_words("the data", "data.fingerprint", _data)(heads)
    lengths = " | ".join(dict.fromkeys(str(_cut(head.record)) for head in heads))
    tokens = _said(heads, "model.name_or_path")
    where = f"cut at model.max_length = {lengths}" if "|" in lengths else f"of the tokenizers of {tokens}"
    return f"the scores are over other target tokens, {where}: a loss over other tokens is another measure"


def _changed_words(what: str, mark: str, node: Callable[[Record], Any]) -> Callable[[Sequence[Trial]], str]:
    def words(heads: Sequence[Trial]) -> str:
        same = len({canonical(node(head.record)) for head in heads}) == 1
        how = "changed between the runs, though the settings are the same" if same else "differ"
        return f"{what} {how} (fingerprints {' | '.join(_marks(heads, mark))})"

    return words


def _marks(heads: Sequence[Trial], mark: str) -> list[str]:
    return list(dict.fromkeys(str(lookup(head.record, mark)) for head in heads))


def _said(heads: Sequence[Trial], key: str) -> str:
    return " | ".join(dict.fromkeys(label(lookup(head.record["config"], key)) for head in heads))


def _setting(name: str, key: str) -> Callable[[Sequence[Trial]], str]:
    return lambda heads: f"{name} {_said(heads, key)}"


_REASONS: dict[str, Callable[[Sequence[Trial]], str]] = {
    "task": _setting("the task is", "model.task"),
    "metric": _setting("the metric is", "metric"),
    "direction": _setting("better is", "metric_mode"),
    "targets": _other_targets,
    "data": lambda heads: _changed_words("the data", "data.fingerprint", _data)(heads),
    "files": lambda heads: _changed_words("the data files", "data.source", _files)(heads),
    "base": lambda heads: _changed_words("the base's weights", "base.fingerprint", _base)(heads),
}


def _part(whole: Study, inside: Sequence[Trial]) -> Study:
    """With every axis of the whole, so that an arm has its name though no other stands beside it."""
    moving = [axis for axis, labels in whole.axes.items() if axis != environments.AXIS and len(labels) > 1]
    axes = {axis: values for axis in moving if (values := _along(inside, axis, whole.axes[axis]))}
    found = [(trial.folder, trial.record, trial.status) for trial in inside]
    return replace(assemble(whole.folder, {**whole.about, "axes": axes}, found), packs=whole.packs)


def _along(inside: Sequence[Trial], axis: str, labels: Sequence[str]) -> list[Any]:
    """The values that trials have on an axis, in its order."""
    known = sorted(
        (trial for trial in inside if trial.values[axis] in labels), key=lambda t: labels.index(t.values[axis])
    )
    return [axis_value(trial.record, axis) for trial in known]


def _grounds(found: Sequence[Trial]) -> dict[Any, Ground]:
    """What each completed trial's score is a score of, by folder."""
    known = {_rows(trial.record): trial.record["data"].get("targets") for trial in found}
    known = {rows: targets for rows, targets in known.items() if targets}
    grounds = {trial.folder: _ground(trial.record, known) for trial in found}
    for key, mark, node in _REWRITTEN:
        for changed in _changed(found, grounds, node, mark):
            for trial in changed:
                grounds[trial.folder][key] = str(lookup(trial.record, mark))
    return grounds


def _ground(record: Record, known: Mapping[str, str]) -> Ground:
    config = record["config"]
    metric = str(config.get("metric") or "val/loss")
    rows = _rows(record)
    targets = record["data"].get("targets") or known.get(rows, rows)
    if metric.endswith("rouge_l"):  # of whole texts: no token of theirs is cut
        targets = f"{record['data']['fingerprint']} {record['data'].get('rouge') or 'published'}"
    task, direction = str(lookup(config, "model.task")), str(config.get("metric_mode") or "min")
    return {"task": task, "metric": metric, "direction": direction, "targets": targets}


def _rows(record: Record) -> str:
    """What stands for the targets where their fingerprint was not recorded: rows, tokenizer and where they were cut."""
    config, data = record["config"], record["data"]
    task = lookup(config, "model.task")
    cut = _cut(record) if data["truncated"] else "whole"
    tokens = [lookup(config, "model.tokenizer") or lookup(config, "model.name_or_path"), cut]
    return canonical([data["fingerprint"], task, *(tokens if task != "sequence_classification" else [])])


def _cut(record: Record) -> Any:
    """Tokens at which rows were cut: as recorded, else as configured."""
    return record["data"].get("max_length") or lookup(record["config"], "model.max_length")


def _data(record: Record) -> Any:
    """The settings from which the fingerprint of the rows follows."""
    config = record["config"]
    scoring = ("batch_size", "generate_rows", "generation", "rouge")
    kept = {key: value for key, value in (config.get("data") or {}).items() if key not in scoring}
    return [kept, record["choices"].get("data"), lookup(config, "model.task")]


def _files(record: Record) -> Any:
    return [lookup(record["config"], f"data.{split}") for split in ("train", "validation", "test")]


def _base(record: Record) -> Any:
    """The settings from which the base's fingerprint follows; schema 1 took it of the weights as they were loaded."""
    config = record["config"]
    model = config.get("model") or {}
    if record["schema"] > 1:
        return [model.get(key) for key in ("name_or_path", "revision", "config", "draw")]
    loaded = [config.get("quantization"), config.get("trainer"), record["memory"]["device"]]
    kept = {key: value for key, value in model.items() if key != "max_length"}
    return [1, kept, record["choices"].get("model"), loaded, record["data"]["fingerprint"]]


_REWRITTEN = (
    ("data", "data.fingerprint", _data),
    ("files", "data.source", _files),
    ("base", "base.fingerprint", _base),
)


def _changed(
    found: Sequence[Trial], grounds: Mapping[Any, Ground], node: Callable[[Record], Any], mark: str
) -> Iterator[list[Trial]]:
    """The sets within which the same settings stand for several fingerprints: something was rewritten between."""
    sets: dict[str, list[Trial]] = {}
    for trial in found:
        sets.setdefault(json.dumps(grounds[trial.folder]), []).append(trial)
    for inside in sets.values():
        marks: dict[str, set[str]] = {}
        for trial in inside:
            if value := lookup(trial.record, mark):
                marks.setdefault(canonical(node(trial.record)), set()).add(value)
        if any(len(values) > 1 for values in marks.values()):
            yield inside


def _likely(whole: Study, trial: Trial, heads: Mapping[str, Trial]) -> str:
    """The set a trial without a result would have joined: the one whose data settings are most like its own."""
    keys = [axis for axis in whole.axes if axis.split(".")[0] in ("data", "model")]
    return max(heads, key=lambda key: sum(heads[key].values[axis] == trial.values[axis] for axis in keys))


def _distinct(part: Study, *keys: str) -> list[str]:
    """The value all completed trials of the set share, for each key."""
    found = ({lookup(trial.record, key) for trial in part.trials if trial.ok} for key in keys)
    return [str(values.pop()) for values in found if len(values) == 1 and None not in values]

"""Where the numbers come from: machine, versions, data, base; and what the sweep holds fixed."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

from loralab.analysis.results import SweepResults
from loralab.analysis.trials import TrialResult
from loralab.analysis.tuning import tuned_axes
from loralab.analysis.values import Json, canonical, is_number, label, lookup, sort_key
from loralab.config.compose import sweep_axes
from loralab.config.sweep_files import chosen_by
from loralab.records.record import RESULT
from loralab.records.shared import distinct, kept

# What a reader asks first; shown where it is one value in all trials.
_FIXED = (
    *("model.name_or_path", "model.max_length", "data.train", "data.prompt", "data.target", "data.text", "data.label"),
    *("data.batch_size", "data.limit", "adapter.r", "adapter.lora_alpha", "adapter.target_modules", "optimizer.lr"),
    *("optimizer.weight_decay", "trainer.max_steps", "trainer.accumulate_grad_batches", "trainer.precision"),
)
# What sentences call an axis, besides its own name.
_SPOKEN = {
    "optimizer.lr": ("learning rate",),
    "adapter.lora_alpha": ("alpha",),
    "quantization": ("NF4", "block size", "data type"),
    "quantization.block_size": ("block size",),
    "trainer.max_steps": ("no training",),
    "adapter.target_modules": ("every linear layer",),
}
_TEMPLATES = ("data.prompt", "data.target", "data.text")
_GROUPS = ("model", "data", "adapter", "quantization", "optimizer", "schedule")
_PROVENANCE = {
    "data": "data.name",
    "data fingerprint": "data.fingerprint",
    "fingerprint of the target tokens": "data.targets",
    "rows": "data.rows",
    "truncated rows": "data.truncated",
    "base": "base.name",
    "base fingerprint": "base.fingerprint",
    "base parameters": "base.parameters",
    "quantized parameters": "base.quantized_parameters",
    "quantized weights are dequantized": "base.dequantize",
    "device": "memory.device",
    "precision of the passes": "base.precision",
    "threads": "environment.threads",
    "optimizer": "optimizer.effective_name",
    "Python": "environment.python",
    "commands run in": "cwd",
}


@dataclass(frozen=True)
class Facts:
    """Texts by term; where trials differ, each value. ``seconds``: running time, a pack counted once."""

    header: dict[str, str]
    provenance: dict[str, str]
    seconds: float


@kept
def facts(results: SweepResults) -> Facts:
    """Everything about where and on what the trials ran."""
    trials = [trial for trial in results.trials if trial.record["config"] or trial.ok]
    told = partial(_distinct, _sections([trial.record for trial in trials]))
    hardware = [told(f"environment.{part}") for part in ("gpu", "cpu")]
    header = {
        "when": _when(results),
        "hardware": " / ".join(filter(None, hardware)),
        "versions": told("environment.versions"),
        "git": told("environment.git"),
    }
    provenance = {term: told(key) for term, key in _PROVENANCE.items()}
    provenance["optimizer"] = provenance["optimizer"] or told("optimizer.name")
    seeds = ", ".join(sorted({trial.seed for trial in results.trials}, key=sort_key))
    provenance = {"seeds": seeds, **provenance, "peak memory, predicted over measured": _reconciled(trials)}
    walls = ((trial.get("time.wall_s"), trial.get("pack.size")) for trial in trials)  # a pack has one clock
    return Facts(header, provenance, sum(wall / (size or 1) for wall, size in walls if is_number(wall)))


@kept
def held_fixed(results: SweepResults) -> list[str]:
    """What sweep.json says is held fixed, and what the trials' configurations show."""
    stated = results.about.get("fixed") if asks_its_own(results) else None
    if isinstance(stated, Mapping):
        texts = [f"{key}: {brief(value)}" for key, value in stated.items()]
    else:
        texts = [brief(item) for item in (stated if isinstance(stated, list) else [stated])]
    texts = [_uncontradicted(text, _further(results)) for text in texts]
    trials = [trial for trial in results.trials if trial.record["config"]]
    return list(filter(None, [*texts, "" if stated else _alpha(trials), _common(results, trials)]))


def asks_its_own(results: SweepResults) -> bool:
    """Whether the run varies what its sweep file asks about; without a file, it does."""
    file_axes, moving = _own_axes(results), results.moving()
    return not file_axes or not moving or any(axis in file_axes for axis in moving)


def question(results: SweepResults) -> str:
    """The sweep file's, and what else is varied; where none of its own axes is, what is varied instead."""
    moving, further = ", ".join(results.moving()), ", ".join(_further(results))
    if not asks_its_own(results):
        elsewhere = f"(The sweep file {results.name} asks about other axes, which are not varied here.)"
        return f"What does {moving} do? {elsewhere}"
    return f"{results.question} (Varied here too: {further}.)" if results.question and further else results.question


def brief(value: Any) -> str:
    """A JSON value as a short text."""
    if value is None or value in ("", {}, []):
        return ""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {brief(item)}" for key, item in value.items() if item not in (None, ""))
    if isinstance(value, list):
        return ", ".join(brief(item) for item in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _own_axes(results: SweepResults) -> list[str]:
    """What the sweep file varies besides seeds; empty where there is no sweep file, or it is not here."""
    overrides = results.about.get("overrides")
    chosen = chosen_by(list(map(str, overrides))) if isinstance(overrides, list) else None
    begun_in = Path(str(results.about["cwd"])) if results.about.get("cwd") else None
    return [axis for axis in sweep_axes(chosen, begun_in) if axis != "seed"] if chosen else []


def _further(results: SweepResults) -> list[str]:
    """Axes of this run of which the sweep file, that speaks of what it holds fixed, knows nothing."""
    file_axes = _own_axes(results)
    known = [*file_axes, *tuned_axes(results)]
    return (
        [axis for axis in results.moving() if axis not in known and axis in results.about["axes"]] if file_axes else []
    )


def _uncontradicted(text: str, further: list[str]) -> str:
    """Its clauses but those that speak of a setting that is varied here."""
    patterns = [re.escape(word) for axis in further for word in (axis.rpartition(".")[2], *_SPOKEN.get(axis, ()))]
    mention = re.compile(rf"(?<![\w.])({'|'.join(patterns)})(?!\w)")
    return "; ".join(clause for clause in text.split("; ") if not (patterns and mention.search(clause)))


def _common(results: SweepResults, trials: Sequence[TrialResult]) -> str:
    """``model = tiny, data.batch_size = 4``: the choices and settings that all trials share."""
    pairs = []
    sections = _sections([trial.record["config"] for trial in trials])
    chosen = distinct(trial.record["choices"] for trial in trials)
    for group in _GROUPS:
        options = {canonical(choices.get(group)) for choices in chosen}
        if len(options) == 1 and group not in results.axes and options != {"null"}:
            pairs.append(f"{group} = {label(trials[0].record['choices'][group])}")
    for key in _FIXED:
        name, _, rest = key.partition(".")
        values = {canonical(lookup(section, rest)) for section in sections(name)}
        value = trials[0].setting(key) if trials else None
        if len(values) == 1 and key not in results.axes and value not in (None, ""):
            pairs.append(f"{key} = {json.dumps(value) if key in _TEMPLATES else label(value)}")
    return ", ".join(pairs)


def _alpha(trials: Sequence[TrialResult]) -> str:
    """How lora_alpha goes with r, where r moves; empty where it goes in no simple way."""
    adapters = distinct(trial.record["config"].get("adapter") for trial in trials)
    pairs = {(lookup(adapter, "r"), lookup(adapter, "lora_alpha")) for adapter in adapters}
    numeric = {(r, alpha) for r, alpha in pairs if is_number(r) and is_number(alpha) and r}
    alphas, ratios = {alpha for _, alpha in numeric}, {alpha / r for r, alpha in numeric}
    if len({r for r, _ in numeric}) < 2:
        return ""
    if len(alphas) == 1:
        return f"lora_alpha = {label(alphas.pop())} while r moves"
    return f"lora_alpha / r = {label(ratios.pop())} while r moves" if len(ratios) == 1 else ""


def _sections(records: Sequence[Json]) -> Callable[[str], list[Any]]:
    """A function that returns what records have under a name, of the sections that they share each once."""
    return cache(lambda name: distinct(record.get(name) for record in records))


def _distinct(sections: Callable[[str], list[Any]], key: str) -> str:
    """Each value, once, of a key of the record."""
    name, _, rest = key.partition(".")
    values = (lookup(section, rest) if rest else section for section in sections(name))
    return " | ".join(dict.fromkeys(text for value in values if (text := brief(value))))


def _reconciled(trials: Iterable[TrialResult]) -> str:
    """The range of predicted over measured peak memory."""
    peaks = [(trial.get("memory.predicted_peak_bytes"), trial.get("memory.measured_peak_bytes")) for trial in trials]
    ratios = [predicted / measured for predicted, measured in peaks if predicted and measured]
    return f"{min(ratios):.3f} to {max(ratios):.3f} over {len(ratios)} trials" if ratios else ""


def _when(results: SweepResults) -> str:
    """From the first to the last write of a record, in local time."""
    stamps = list(filter(None, (_written(trial.folder / RESULT) for trial in results.trials)))
    if not stamps:
        return ""
    first, last = (datetime.fromtimestamp(stamp).astimezone() for stamp in (min(stamps), max(stamps)))
    end = last.strftime("%H:%M %Z" if first.date() == last.date() else "%Y-%m-%d %H:%M %Z")
    begin = first.strftime("%Y-%m-%d %H:%M")
    return f"{begin} to {end}" if begin[-5:] != end[:5] else last.strftime("%Y-%m-%d %H:%M %Z")


def _written(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None

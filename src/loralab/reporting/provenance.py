"""Where the numbers come from: machine, versions, data, base; and what the study holds fixed."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from loralab.config.compose import sweep_axes
from loralab.records.record import RESULT
from loralab.reporting import environments
from loralab.reporting.axes import Record, canonical, is_number, label, lookup, sort_key
from loralab.reporting.gather import Study

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


@dataclass(frozen=True)
class Facts:
    """Texts by term; where trials differ, each value. ``seconds``: running time, a pack counted once."""

    header: dict[str, str]
    provenance: dict[str, str]
    seconds: float


def facts(study: Study) -> Facts:
    """Everything about where and on what the study ran."""
    found = [trial.record for trial in study.trials if trial.record["config"] or trial.ok]
    one: Callable[[str], str] = lambda key: _distinct(lookup(record, key) for record in found)  # noqa: E731
    hardware = " / ".join(text for text in (one("environment.gpu"), one("environment.cpu")) if text)
    seeds = sorted({trial.seed for trial in study.trials}, key=sort_key)
    header = {
        "when": _when(study),
        "hardware": hardware,
        "versions": one("environment.versions"),
        "git": one("environment.git"),
    }
    provenance = {
        "seeds": ", ".join(seeds),
        "data": one("data.name"),
        "data fingerprint": one("data.fingerprint"),
        "fingerprint of the target tokens": one("data.targets"),
        "rows": one("data.rows"),
        "truncated rows": one("data.truncated"),
        "base": one("base.name"),
        "base fingerprint": one("base.fingerprint"),
        "base parameters": _counts(found, "base.parameters"),
        "quantized parameters": _counts(found, "base.quantized_parameters"),
        "device": one("memory.device"),
        "threads": one("environment.threads"),
        "optimizer": one("optimizer.effective_name") or one("optimizer.name"),
        "Python": one("environment.python"),
        "commands run in": one("cwd"),
        "peak memory, predicted over measured": _reconciled(found),
    }
    return Facts(header, provenance, _seconds(found))


def held_fixed(study: Study) -> list[str]:
    """What sweep.json says is held fixed, and what the trials' configurations show."""
    said = study.about.get("fixed")
    if not asks_its_own(study):
        said = None
    texts = [f"{key}: {brief(value)}" for key, value in said.items()] if isinstance(said, Mapping) else []
    if said and not texts:
        texts = [brief(item) for item in said] if isinstance(said, list) else [brief(said)]
    texts = [kept for text in texts if (kept := _uncontradicted(text, _further(study)))]
    found = [trial.record for trial in study.trials if trial.record["config"]]
    return [text for text in [*texts, *([] if said else _alpha(study, found)), _common(study, found)] if text]


def asks_its_own(study: Study) -> bool:
    """Whether the run varies what its sweep file asks about; without a file, it does."""
    own, moving = _own_axes(study), _moving(study)
    return not own or not moving or any(axis in own for axis in moving)


def question(study: Study) -> str:
    """The sweep file's, and what else is varied; where none of its own axes is, what is varied instead."""
    moving, further = ", ".join(_moving(study)), ", ".join(_further(study))
    if not asks_its_own(study):
        return f"What does {moving} do? (The sweep file {study.name} asks about other axes, which are not varied here.)"
    return f"{study.question} (Varied here too: {further}.)" if study.question and further else study.question


def _moving(study: Study) -> list[str]:
    return [axis for axis, labels in study.axes.items() if len(labels) > 1 and axis != environments.AXIS]


def _own_axes(study: Study) -> list[str]:
    """What the sweep file varies besides seeds; empty where the study is of none, or the file is not here."""
    words = study.about.get("overrides")
    words = words if isinstance(words, list) else []
    names = [word.partition("=")[2] for word in map(str, words) if word.lstrip("+").startswith("sweeps=")]
    return [axis for name in names[:1] for axis in sweep_axes(name) if axis != "seed"]


def _further(study: Study) -> list[str]:
    """Axes of this run of which the sweep file, that speaks of what it holds fixed, knows nothing."""
    own = _own_axes(study)
    return [axis for axis in _moving(study) if axis not in own and axis in study.about["axes"]] if own else []


def _uncontradicted(text: str, further: list[str]) -> str:
    """Its clauses but those that speak of a setting that is varied here."""
    words = [re.escape(word) for axis in further for word in (axis.rpartition(".")[2], *_SPOKEN.get(axis, ()))]
    spoken = re.compile(rf"(?<![\w.])({'|'.join(words)})(?!\w)")
    return "; ".join(clause for clause in text.split("; ") if not (words and spoken.search(clause)))


def brief(value: Any) -> str:
    """A JSON value as a short text."""
    if value is None or value in ("", {}, []):
        return ""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {brief(item)}" for key, item in value.items() if item not in (None, ""))
    if isinstance(value, list):
        return ", ".join(brief(item) for item in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _common(study: Study, found: list[Record]) -> str:
    pairs = []
    for group in _GROUPS:
        options = {canonical(record["choices"].get(group)) for record in found}
        if len(options) == 1 and group not in study.axes and options != {"null"}:
            pairs.append(f"{group} = {label(found[0]['choices'][group])}")
    for key in _FIXED:
        values = {canonical(lookup(record["config"], key)) for record in found}
        value = lookup(found[0]["config"], key) if found else None
        if len(values) == 1 and key not in study.axes and value not in (None, ""):
            pairs.append(f"{key} = {json.dumps(value) if key in _TEMPLATES else label(value)}")
    return ", ".join(pairs)


def _alpha(study: Study, found: list[Record]) -> list[str]:
    """How lora_alpha goes with r, where r moves."""
    pairs = {
        (lookup(record["config"], "adapter.r"), lookup(record["config"], "adapter.lora_alpha")) for record in found
    }
    known = {(r, alpha) for r, alpha in pairs if is_number(r) and is_number(alpha) and r}
    if len({r for r, _ in known}) < 2:
        return []
    if len({alpha for _, alpha in known}) == 1:
        return [f"lora_alpha = {label(next(iter(known))[1])} while r moves"]
    ratios = {alpha / r for r, alpha in known}
    return [f"lora_alpha / r = {label(ratios.pop())} while r moves"] if len(ratios) == 1 else []


def _distinct(values: Iterable[Any]) -> str:
    return " | ".join(dict.fromkeys(text for value in values if (text := brief(value))))


def _counts(found: list[Record], key: str) -> str:
    return _distinct(lookup(record, key) for record in found)


def _reconciled(found: list[Record]) -> str:
    """The range of predicted over measured peak memory."""
    ratios = []
    for record in found:
        predicted, measured = (
            record["memory"]["predicted_peak_bytes"],
            record["memory"]["measured_peak_bytes"],
        )
        if predicted and measured:
            ratios.append(predicted / measured)
    if not ratios:
        return ""
    return f"{min(ratios):.3f} to {max(ratios):.3f} over {len(ratios)} trials"


def _seconds(found: list[Record]) -> float:
    """Sum of wall_s; the trials of a pack share one wall clock, so each counts its part."""
    walls = ((record["time"]["wall_s"], record["pack"]["size"]) for record in found)
    return sum(wall / (size or 1) for wall, size in walls if is_number(wall))


def _when(study: Study) -> str:
    """From the first to the last write of a record, in local time."""
    paths = [trial.folder / RESULT for trial in study.trials]
    stamps = [path.stat().st_mtime for path in paths if path.exists()]
    if not stamps:
        return ""
    first, last = (datetime.fromtimestamp(stamp).astimezone() for stamp in (min(stamps), max(stamps)))
    end = last.strftime("%H:%M %Z" if first.date() == last.date() else "%Y-%m-%d %H:%M %Z")
    begin = first.strftime("%Y-%m-%d %H:%M")
    return f"{begin} to {end}" if begin[-5:] != end[:5] else last.strftime("%Y-%m-%d %H:%M %Z")

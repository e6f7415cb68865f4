"""Where the numbers come from: machine, versions, data, base; and what the study holds fixed."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from loralab.record import RESULT
from loralab.reporting.axes import Record, canonical, is_number, label, lookup, sort_key
from loralab.reporting.gather import Study

# What a reader asks first; shown where it is one value in all trials.
_FIXED = (
    *("model.name_or_path", "model.max_length", "data.train", "data.prompt", "data.target", "data.text", "data.label"),
    *("data.batch_size", "data.limit", "adapter.r", "adapter.lora_alpha", "adapter.target_modules", "optimizer.lr"),
    *("optimizer.weight_decay", "trainer.max_steps", "trainer.accumulate_grad_batches", "trainer.precision"),
)
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
        "targets fingerprint": one("data.targets"),
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
        "memory predicted / measured": _reconciled(found),
    }
    return Facts(header, provenance, _seconds(found))


def held_fixed(study: Study) -> list[str]:
    """What sweep.json says is held fixed, and what the trials' configurations show."""
    said = study.about.get("fixed")
    texts = [f"{key}: {brief(value)}" for key, value in said.items()] if isinstance(said, Mapping) else []
    if said and not texts:
        texts = [brief(item) for item in said] if isinstance(said, list) else [brief(said)]
    found = [trial.record for trial in study.trials if trial.record["config"]]
    return [text for text in [*texts, *([] if said else _alpha(study, found)), _common(study, found)] if text]


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

"""Whether a completed record still says what its trial would give now: on the same base, tokenizer and data.

Nothing is loaded for it: all is compared by the bytes on disk. What is not on this machine cannot be said to have
changed.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loralab import fingerprints
from loralab.config import build
from loralab.record import RESULT

# Where the specs need torch and more to be imported, the plain settings are enough.
BASES = {"loralab.models.Pretrained": "pretrained", "loralab.models.Random": "random"}
KEPT = {RESULT: "result.stale.json", "metrics.jsonl": "metrics.stale.jsonl", "adapter": "adapter.stale"}

_PATHS = ("name_or_path", "tokenizer", "name", "train", "validation", "test")
# What may be said of it, its fingerprint in the record, what takes its fingerprint now, and of which settings.
Compared = tuple[str, Any, Callable[[Mapping[str, Any]], str | None], Mapping[str, Any]]
Known = dict[tuple[str, str], str | None]


def outdated(stored: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    """Why the completed record ``stored`` does not finish the trial of the configuration ``content``; else empty."""
    if changed := _changed(_compared(stored, content), {}):
        return changed
    tested = any(key.startswith("test/") for key in stored["metrics"])
    if content["trainer"].get("test") and (stored["data"].get("rows") or {}).get("test") and not tested:
        return "trainer.test was off"
    return ""


def of_record(stored: Mapping[str, Any], known: Known | None = None) -> str:
    """What has changed since a completed record was written; empty where nothing that is on this machine has.

    Relative paths are those of the folder where the run was started. ``known`` keeps what was looked up, for other
    records of the same reading: a thousand trials on one base look at its files once.
    """
    config = stored["config"]
    if stored["schema"] < 2 or not all(isinstance(config.get(part), Mapping) for part in ("model", "data")):
        return ""  # schema 1 took other fingerprints
    content = {part: _placed(config[part], stored.get("cwd")) for part in ("model", "data")}
    return _changed(_compared(stored, content), {} if known is None else known)


def _placed(node: Mapping[str, Any], cwd: Any) -> dict[str, Any]:
    """The same with its paths below ``cwd``, whatever of the same name lies in the present folder."""
    if not isinstance(cwd, str):
        return dict(node)
    return {key: _below(Path(cwd), value) if key in _PATHS else value for key, value in node.items()}


def _below(cwd: Path, value: Any) -> Any:
    if not isinstance(value, str) or not value or Path(value).expanduser().is_absolute():
        return value
    return str(cwd / value) if (cwd / value).exists() or Path(value).exists() else value


def _changed(compared: list[Compared], known: Known) -> str:
    """``the data files have changed since``; ``known``: see ``of_record``."""
    found = []
    for what, before, fingerprint, node in compared:
        if not before:
            continue
        key = (fingerprint.__name__, json.dumps(node, sort_keys=True, default=repr))
        if key not in known:
            known[key] = _present(fingerprint, node)
        found += [what] if known[key] not in (None, before) else []
    return f"{' and '.join(found)} since" if found else ""


def _compared(stored: Mapping[str, Any], content: Mapping[str, Any]) -> list[Compared]:
    model = content["model"]
    tokenizer = model.get("tokenizer") or model.get("name_or_path") or ""
    name = model.get("name_or_path") or "model=random"
    return [
        (f"the weights of {name} have changed", stored["base"].get("fingerprint"), _base, model),
        (f"the tokenizer {tokenizer} has changed", stored["data"].get("tokenizer"), _tokenizer, model),
        ("the data files have changed", stored["data"].get("source"), _data, content["data"]),
    ]


def _present(fingerprint: Any, node: Mapping[str, Any]) -> str | None:
    try:
        found: str | None = fingerprint(node)
    except Exception:  # a class or files of the user's own; whoever runs the trial is told
        return None
    return found


def _base(node: Mapping[str, Any]) -> str | None:
    kind = BASES.get(str(node.get("_target_")))
    if kind == "pretrained":
        return fingerprints.of_pretrained(str(node["name_or_path"]))
    if kind == "random":
        return fingerprints.of_random(node)
    if str(node.get("_target_")).startswith("loralab."):  # of another version; to look for it would import torch
        return None
    found: str | None = build(node, "model").fingerprint()
    return found


def _tokenizer(node: Mapping[str, Any]) -> str | None:
    return fingerprints.of_tokenizer(str(node.get("tokenizer") or node.get("name_or_path") or ""))


def _data(node: Mapping[str, Any]) -> str | None:
    found: str | None = build(node, "data").source()
    return found


def set_aside(folder: Path) -> None:
    """Keeps what a run left under names of its own, so that the next one overwrites nothing."""
    for name, kept in KEPT.items():
        target = folder / kept
        if not (folder / name).exists():
            continue
        if target.is_dir():
            shutil.rmtree(target)
        (folder / name).replace(target)

"""Whether a completed record still says what its trial would give now: on the same base, tokenizer and data.

Nothing is loaded for it: all is compared by the bytes on disk. What is not on this machine cannot be said to have
changed.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loralab import fingerprints
from loralab.config import build
from loralab.errors import LoralabError
from loralab.record import RESULT

# Where the specs need torch and more to be imported, the plain settings are enough.
BASES = {"loralab.models.Pretrained": "pretrained", "loralab.models.Random": "random"}
KEPT = {RESULT: "result.stale.json", "metrics.jsonl": "metrics.stale.jsonl", "adapter": "adapter.stale"}


def outdated(stored: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    """Why the completed record ``stored`` does not finish the trial of the configuration ``content``; else empty."""
    if changed := [what for what, before, now in _compared(stored, content) if before and now and before != now]:
        return f"{' and '.join(changed)} since"
    tested = any(key.startswith("test/") for key in stored["metrics"])
    if content["trainer"].get("test") and (stored["data"].get("rows") or {}).get("test") and not tested:
        return "trainer.test was off"
    return ""


def _compared(stored: Mapping[str, Any], content: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(what may be said of it, its fingerprint in the record, its fingerprint now or None)."""
    model = content["model"]
    tokenizer = model.get("tokenizer") or model.get("name_or_path") or ""
    name = model.get("name_or_path") or "model=random"
    return [
        (f"the weights of {name} have changed", stored["base"].get("fingerprint"), _present(_base, model)),
        (f"the tokenizer {tokenizer} has changed", stored["data"].get("tokenizer"), _present(_tokenizer, model)),
        ("the data files have changed", stored["data"].get("source"), _present(_data, content["data"])),
    ]


def _present(fingerprint: Any, node: Mapping[str, Any]) -> str | None:
    try:
        found: str | None = fingerprint(node)
    except (OSError, LoralabError):  # whoever runs it is told
        return None
    return found


def _base(node: Mapping[str, Any]) -> str | None:
    kind = BASES.get(str(node.get("_target_")))
    if kind == "pretrained":
        return fingerprints.of_pretrained(str(node["name_or_path"]))
    if kind == "random":
        return fingerprints.of_random(node)
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

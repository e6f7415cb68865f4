"""Whether a completed record still says what its trial would give now: on the same base, tokenizer and data, by the
same classes.

Nothing is loaded for it: all is compared by the bytes on disk. What is not on this machine cannot be said to have
changed.
"""

from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from loralab import fingerprints, sources
from loralab.config import build
from loralab.errors import LoralabError
from loralab.record import RESULT

# Where the specs need torch and more to be imported, the plain settings are enough.
BASES = {"loralab.models.Pretrained": "pretrained", "loralab.models.Random": "random"}
KEPT = {RESULT: "result.stale.json", "metrics.jsonl": "metrics.stale.jsonl", "adapter": "adapter.stale"}


def outdated(stored: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    """Why the completed record ``stored`` does not finish the trial of the configuration ``content``; else empty."""
    changed = [what for what, before, now in _compared(stored, content) if before and now and before != now]
    changed += [f"{file} has changed" for file in sources.changed(stored["code"].get("sources") or {})]
    if changed:
        return f"{' and '.join(changed)} since"
    if not stored["metrics"]:
        return "it has no metrics"
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
    """Keeps what a run left under names of its own, so that the next one overwrites nothing.

    What was set aside before gets a number (``result.stale.1.json``, the oldest is 1). Only renames, the record's last:
    after a kill in between, the next call goes on where this one was.
    """
    if not (folder / RESULT).exists():
        return
    record = KEPT[RESULT]
    number = next(n for n in count(1) if not (folder / _numbered(record, n)).exists())
    if (folder / record).exists():
        _rename(folder, {kept: _numbered(kept, number) for kept in reversed(KEPT.values())})
    _rename(folder, {name: KEPT[name] for name in reversed(KEPT)})


def _rename(folder: Path, names: Mapping[str, str]) -> None:
    for name, wanted in names.items():
        if (folder / name).exists():
            free = (_numbered(wanted, n) if n else wanted for n in count())
            (folder / name).rename(next(folder / one for one in free if not (folder / one).exists()))


def _numbered(name: str, number: int) -> str:
    stem, dot, end = name.partition(".stale")
    return f"{stem}{dot}.{number}{end}"

"""Is a completed record still valid: have the base, the tokenizer, the data and the user's classes changed since?

Nothing is loaded: fingerprints of the files are compared. What is not on this machine counts as unchanged.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from loralab.config.build import build
from loralab.config.identity import plain
from loralab.data.base import FORGETTING
from loralab.records import fingerprints, sources
from loralab.records.record import RESULT

# These classes need torch; their fingerprints are taken from the plain settings instead.
BASES = {"loralab.models.pretrained.Pretrained": "pretrained", "loralab.models.pretrained.Random": "random"}
KEPT = {
    RESULT: "result.stale.json",
    "metrics.jsonl": "metrics.stale.jsonl",
    "predictions.jsonl": "predictions.stale.jsonl",
    "adapter": "adapter.stale",
}

_PATHS = ("name_or_path", "tokenizer", "name", "train", "validation", "test")
# (message, fingerprint in the record, function that takes the present one, settings for it)
Compared = tuple[str, Any, Callable[[Mapping[str, Any]], str | None], Mapping[str, Any]]
Known = dict[tuple[str, str], str | None]


def outdated(stored: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    """Why the completed record ``stored`` does not finish the trial of the configuration ``content``; else empty."""
    if changed := _changed(stored, content, {}):
        return changed
    return "" if stored["metrics"] or stored["status"] != "completed" else "it has no metrics"


def unscored(stored: Mapping[str, Any], content: Mapping[str, Any]) -> list[str]:
    """What the configuration ``content`` asks to be scored that the completed record ``stored`` has no scores of:
    ``test``, ``forgetting``."""
    tested = any(key.startswith("test/") for key in stored["metrics"])
    test = content["trainer"].get("test") and (stored["data"].get("rows") or {}).get("test") and not tested
    asked = {"test": test, FORGETTING: _unmeasured(stored, content["data"].get(FORGETTING))}
    return [split for split, lacks in asked.items() if lacks and stored["status"] == "completed"]


def _unmeasured(stored: Mapping[str, Any], node: Any) -> bool:
    """Whether a record has no scores on the data set ``node``, as it is now; None: none are asked for."""
    if node is None:
        return False
    before, scored = stored["config"]["data"].get(FORGETTING), stored["data"].get(FORGETTING)
    if not scored or f"{FORGETTING}/loss" not in stored["metrics"] or plain(before) != plain(node):
        return True
    return _present(_data, node) not in (None, scored["source"])


def of_record(stored: Mapping[str, Any], known: Known | None = None) -> str:
    """What has changed since a completed record was written; empty where nothing on this machine has.

    Relative paths are relative to the folder where the run was started. ``known`` caches fingerprints for further
    records, so that the files of a base are read once for a thousand trials.
    """
    config = stored["config"]
    if stored["schema"] < 2 or not all(isinstance(config.get(part), Mapping) for part in ("model", "data")):
        return ""  # schema 1 took other fingerprints
    return _changed(stored, placed(config, stored.get("cwd")), {} if known is None else known)


def base_changed(stored: Mapping[str, Any]) -> str:
    """Whether base or tokenizer have changed since a record was written, in words; empty where they have not."""
    content = placed(stored["config"], stored.get("cwd"))
    return _said(_compared(stored, content)[:2], {})


def placed(config: Mapping[str, Any], cwd: Any) -> dict[str, Any]:
    """``config`` with the relative paths of its model and data below ``cwd``, the folder where the run was started."""
    if not isinstance(cwd, str):
        return dict(config)
    nodes = {part: config[part] for part in ("model", "data")}
    return {
        **config,
        **{
            part: {key: _below(Path(cwd), value) if key in _PATHS else value for key, value in node.items()}
            for part, node in nodes.items()
        },
    }


def _below(cwd: Path, value: Any) -> Any:
    if not isinstance(value, str) or not value or Path(value).expanduser().is_absolute():
        return value
    return str(cwd / value) if (cwd / value).exists() or Path(value).exists() else value


def _changed(stored: Mapping[str, Any], content: Mapping[str, Any], known: Known) -> str:
    """``the data files have changed since``; ``known``: see ``of_record``."""
    changed_files = [f"{file} has changed" for file in sources.changed(stored["code"].get("sources") or {})]
    return _said(_compared(stored, content), known, changed_files)


def _said(compared: Iterable[Compared], known: Known, also: Iterable[str] = ()) -> str:
    changes = []
    for message, before, fingerprint, node in compared:
        if not before:
            continue
        key = (fingerprint.__name__, json.dumps(node, sort_keys=True, default=repr))
        if key not in known:
            known[key] = _present(fingerprint, node)
        changes += [message] if known[key] not in (None, before) else []
    changes += also
    return f"{' and '.join(changes)} since" if changes else ""


def _compared(stored: Mapping[str, Any], content: Mapping[str, Any]) -> list[Compared]:
    model, data = content["model"], {name: value for name, value in content["data"].items() if name != FORGETTING}
    tokenizer = model.get("tokenizer") or model.get("name_or_path") or ""
    name = model.get("name_or_path") or "model=random"
    return [
        (f"the weights of {name} have changed", stored["base"].get("fingerprint"), _base, model),
        (f"the tokenizer {tokenizer} has changed", stored["data"].get("tokenizer"), _tokenizer, model),
        ("the data files have changed", stored["data"].get("source"), _data, data),
    ]


def _present(fingerprint: Any, node: Mapping[str, Any]) -> str | None:
    try:
        present: str | None = fingerprint(node)
    except Exception:  # a class or files of the user's: reported when the trial runs
        return None
    return present


def _base(node: Mapping[str, Any]) -> str | None:
    kind = BASES.get(str(node.get("_target_")))
    if kind == "pretrained":
        return fingerprints.of_pretrained(str(node["name_or_path"]))
    if kind == "random":
        return fingerprints.of_random(node)
    if str(node.get("_target_")).startswith(
        "loralab."
    ):  # of another version of loralab; to look it up would import torch
        return None
    fingerprint: str | None = build(node, "model").fingerprint()
    return fingerprint


def _tokenizer(node: Mapping[str, Any]) -> str | None:
    return fingerprints.of_tokenizer(str(node.get("tokenizer") or node.get("name_or_path") or ""))


def _data(node: Mapping[str, Any]) -> str | None:
    source: str | None = build(node, "data").source()
    return source


def set_aside(folder: Path) -> None:
    """Renames the files of a stale run, so that the next run overwrites nothing.

    Files that were set aside before get a number (``result.stale.1.json``, the oldest is 1). The record is renamed
    last: if the process is killed in between, the next call goes on.
    """
    if not (folder / RESULT).exists():
        return
    record = KEPT[RESULT]
    number = next(n for n in count(1) if not (folder / _numbered(record, n)).exists())
    if (folder / record).exists():
        _rename(folder, {name: _numbered(name, number) for name in reversed(KEPT.values())})
    _rename(folder, {name: KEPT[name] for name in reversed(KEPT)})


def _rename(folder: Path, names: Mapping[str, str]) -> None:
    for name, wanted in names.items():
        if (folder / name).exists():
            free = (folder / (_numbered(wanted, n) if n else wanted) for n in count())
            (folder / name).rename(next(path for path in free if not path.exists()))


def _numbered(name: str, number: int) -> str:
    stem, dot, end = name.partition(".stale")
    return f"{stem}{dot}.{number}{end}"

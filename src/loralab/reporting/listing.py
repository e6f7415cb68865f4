"""``loralab ls``: the sweeps and the lone runs under a folder, and how far they are."""

import os
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from loralab.errors import ArtifactError, LoralabError
from loralab.record import RESULT, SWEEP
from loralab.reporting.gather import MISSING, Study, study
from loralab.reporting.table import WIDTH, clip

_FAILED = ("failed", "out_of_memory", "diverged", "interrupted", "pruned")
_SKIP = {"adapter", "checkpoints", "report", "wandb"}


def listing(root: Path) -> list[dict[str, Any]]:
    """One entry per sweep and per run outside of one, the newest last; a damaged one says so in ``error``."""
    if not root.is_dir():
        raise ArtifactError(f"{root}: no such folder; loralab ls DIR lists the sweeps and runs below DIR")
    entries = []
    for folder, below, files in os.walk(root):
        if SWEEP in files or RESULT in files:
            entries.append(_entry(Path(folder), SWEEP if SWEEP in files else RESULT))
            below.clear()
        below[:] = [name for name in below if name not in _SKIP and not name.startswith(".")]
    return sorted(entries, key=lambda entry: (entry["when"], entry["folder"]))


def render(entries: Sequence[dict[str, Any]], width: int = WIDTH) -> str:
    """The listing as plain text, at most ``width`` columns wide."""
    if not entries:
        return "no sweep and no run here\n"
    lines = [("when", "trials", "state", "name", "folder")]
    lines += [(_clock(e["when"]), str(e["trials"]), _state(e), e["name"], e["folder"]) for e in entries]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    texts = ["  ".join(cell.ljust(size) for cell, size in zip(line, [*widths, 0], strict=True)) for line in lines]
    return "".join(clip(text.rstrip(), width) + "\n" for text in texts)


def _entry(folder: Path, name: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": folder.name, "folder": str(folder), "kind": "run", "error": None}
    entry.update(kind="sweep" if name == SWEEP else "run", question="")
    try:
        gathered = study(folder)
    except LoralabError as error:
        when = _iso((folder / name).stat().st_mtime)
        nothing = dict.fromkeys(("trials", "completed", "failed", "running", "missing"), 0)
        return {**entry, **nothing, "statuses": {}, "when": when, "error": str(error)}
    return {**entry, "name": gathered.name, "question": gathered.question, **_counts(gathered, folder / name)}


def _counts(gathered: Study, own: Path) -> dict[str, Any]:
    stamps = [path.stat().st_mtime for t in gathered.trials if (path := t.folder / RESULT).exists()]
    return {
        "trials": len(gathered.trials),
        "completed": gathered.count("completed"),
        "failed": gathered.count(*_FAILED),
        "running": gathered.count("running"),
        "missing": gathered.count(MISSING),
        "statuses": dict(Counter(trial.status for trial in gathered.trials)),
        "when": _iso(max([own.stat().st_mtime, *stamps])),
    }


def _state(entry: dict[str, Any]) -> str:
    if entry["error"]:
        return "damaged"
    statuses = entry["statuses"]
    order = sorted(statuses, key=lambda name: (name != "completed", name))
    return ", ".join(f"{statuses[name]} {name.replace('_', ' ')}" for name in order) or "empty"


def _iso(stamp: float) -> str:
    return datetime.fromtimestamp(stamp).astimezone().isoformat(timespec="seconds")


def _clock(iso: str) -> str:
    return datetime.fromisoformat(iso).strftime("%Y-%m-%d %H:%M")

"""``loralab ls``: the sweeps and the lone runs under a folder, and how far they are."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from loralab.errors import ArtifactError, LoralabError
from loralab.records.record import RESULT, SWEEP
from loralab.reporting.axes import lookup
from loralab.reporting.gather import DAMAGED, MISSING, STALE, UNSCORED, Study, Trial, score, study
from loralab.reporting.table import trial_text
from loralab.reporting.text import WIDTH, wrapped

_FAILED = ("failed", "out_of_memory", "diverged", "interrupted", "pruned", DAMAGED, UNSCORED)
_SKIP = {"adapter", "checkpoints", "report", "wandb"}


def listing(root: Path) -> list[dict[str, Any]]:
    """One entry per sweep and per run outside of one, the newest last; a damaged one says so in ``error``.

    Of a sweep's own folder: one entry per trial.
    """
    if not root.is_dir():
        raise ArtifactError(f"{root}: no such folder; loralab ls DIR lists the sweeps and runs below DIR")
    entries = []
    for folder, below, files in os.walk(root):
        if SWEEP in files or RESULT in files:
            name = SWEEP if SWEEP in files else RESULT
            if Path(folder) == root:
                return _entries(root, name, inside=True)
            entries += _entries(Path(folder), name, inside=False)
            below.clear()
        below[:] = [name for name in below if name not in _SKIP and not name.startswith(".")]
    return sorted(entries, key=lambda entry: (entry["when"], entry["folder"]))


def render(entries: Sequence[dict[str, Any]], width: int = WIDTH) -> str:
    """The listing as plain text, at most ``width`` columns wide; what is long goes on below."""
    if not entries:
        return "no sweep and no run here\n"
    lines: list[tuple[str, ...]] = [("when", "state", "metric", "model", "data", "folder")]
    lines += [(_clock(e["when"]), _state(e), _value(e), *_brief(e), _what(e)) for e in entries]
    if all(entry["kind"] == "trial" for entry in entries):  # of one sweep: its axes tell what differs
        lines = [(*line[:3], line[5]) for line in lines]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]) - 1)]
    texts = ["  ".join(cell.ljust(size) for cell, size in zip(line, [*widths, 0], strict=True)) for line in lines]
    return "".join("\n".join(wrapped(text, width, " " * 18)) + "\n" for text in texts)


def _entries(folder: Path, name: str, inside: bool) -> list[dict[str, Any]]:
    try:
        gathered = study(folder)
    except LoralabError as error:
        return [_entry(folder, "sweep" if name == SWEEP else "run", [], name=folder.name, error=str(error))]
    if name == RESULT:
        (trial,) = gathered.trials
        return [_entry(folder, "run", [trial], name=folder.name, **_scored(gathered, trial))]
    if not inside:
        more = {"name": gathered.name, "question": gathered.question, "metric": gathered.metric}
        more |= {"damaged": gathered.about["damaged"]} if "damaged" in gathered.about else {}
        return [_entry(folder, "sweep", gathered.trials, **more)]
    trials = gathered.trials
    return [_entry(t.folder, "trial", [t], name=trial_text(gathered, t), **_scored(gathered, t)) for t in trials]


def _entry(folder: Path, kind: str, trials: Sequence[Trial], **more: Any) -> dict[str, Any]:
    statuses = Counter(trial.status for trial in trials)
    files = [folder / SWEEP, folder / RESULT, *(trial.folder / RESULT for trial in trials)]
    records = [trial.record for trial in trials]
    return {
        "folder": str(folder),
        "kind": kind,
        "error": None,
        "question": "",
        "trials": len(trials),
        "completed": statuses["completed"],
        "failed": sum(statuses[status] for status in _FAILED),
        "running": statuses["running"],
        "missing": statuses[MISSING],
        "stale": statuses[STALE],
        "changed": _distinct(record.get("stale") for record in records),
        "statuses": dict(statuses),
        "when": _iso(max((path.stat().st_mtime for path in files if path.exists()), default=0.0)),
        "metric": None,
        "value": None,
        "models": _distinct(lookup(r["config"], "model.name_or_path") or r["choices"].get("model") for r in records),
        "data": _distinct(lookup(r["config"], "data.train") or r["choices"].get("data") for r in records),
        "overrides": records[0]["overrides"] if len(records) == 1 else [],
        **more,
    }


def _scored(gathered: Study, trial: Trial) -> dict[str, Any]:
    return {"metric": gathered.metric, "value": score(trial.record, gathered.metric) if trial.ok else None}


def _distinct(values: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(str(value) for value in values if value))


def _state(entry: dict[str, Any]) -> str:
    if entry["error"]:
        return "damaged"
    statuses = entry["statuses"]
    order = sorted(statuses, key=lambda name: (name != "completed", name))
    counted = entry["kind"] == "sweep"
    return ", ".join(f"{statuses[name]} " * counted + name.replace("_", " ") for name in order) or "empty"


def _value(entry: dict[str, Any]) -> str:
    return "-" if entry["value"] is None else f"{entry['metric']} {entry['value']:.4f}"


def _brief(entry: dict[str, Any]) -> tuple[str, str]:
    """Model and data, paths by their last part."""
    model, data = (
        ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
        for names in (_distinct(text.rpartition("/")[2] for text in entry[key]) for key in ("models", "data"))
    )
    return model, data


def _what(entry: dict[str, Any]) -> str:
    """The folder, and what tells one entry from the next where its name does not."""
    if entry["error"]:
        return f"{entry['folder']}  {entry['error']}"
    known = ("model=", "data=", "data.train=", "model.name_or_path=")
    settings = " ".join(word for word in entry["overrides"] if not word.startswith(known))
    more = {"sweep": "" if Path(entry["folder"]).name == entry["name"] else entry["name"], "trial": entry["name"]}
    why = f"  stale: {'; '.join(entry['changed'])}" if entry["changed"] else ""
    why += f"  {entry['damaged']}" if entry.get("damaged") else ""
    return f"{entry['folder']}  {more.get(entry['kind'], settings)}".rstrip() + why


def _iso(stamp: float) -> str:
    return datetime.fromtimestamp(stamp).astimezone().isoformat(timespec="seconds")


def _clock(iso: str) -> str:
    return datetime.fromisoformat(iso).strftime("%Y-%m-%d %H:%M")

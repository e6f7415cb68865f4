"""``loralab ls``: the sweeps and the lone runs under a folder, and how far they are."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from loralab.analysis.results import read_results
from loralab.analysis.trials import DAMAGED, MISSING, STALE, UNSCORED, TrialResult
from loralab.errors import ArtifactError, LoralabError
from loralab.records.record import RESULT, SWEEP
from loralab.reporting.layout import aligned, terminal_width, wrapped

_FAILED = ("failed", "out_of_memory", "diverged", "interrupted", DAMAGED, UNSCORED)
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


def render(entries: Sequence[dict[str, Any]], width: int | None = None) -> str:
    """The listing as plain text, at most ``width`` columns wide (None: the terminal's); what is long goes on below."""
    if not entries:
        return "no sweep and no run here\n"
    titles, rows = ["when", "state", "metric", "model", "data"], [_cells(entry) for entry in entries]
    if all(entry["kind"] == "trial" for entry in entries):  # of one sweep: its axes tell what differs
        titles, rows = titles[:3], [row[:3] for row in rows]
    head, _, *lines = aligned(titles, rows)
    lines = [f"{head}  folder", *(f"{line}  {_what(entry)}" for line, entry in zip(lines, entries, strict=True))]
    return "".join("\n".join(wrapped(line, width or terminal_width(), " " * 18)) + "\n" for line in lines)


def _entries(folder: Path, name: str, inside: bool) -> list[dict[str, Any]]:
    try:
        results = read_results(folder)
    except LoralabError as error:
        return [_entry(folder, "sweep" if name == SWEEP else "run", [], name=folder.name, error=str(error))]
    if name == SWEEP and not inside:
        more = {"name": results.name, "question": results.question, "metric": results.metric}
        more |= {"damaged": results.about["damaged"]} if "damaged" in results.about else {}
        return [_entry(folder, "sweep", results.trials, **more)]
    entries = []
    for trial in results.trials:
        scored = {"metric": results.metric, "value": trial.score(results.metric)}
        kind, name = ("run", trial.name) if name == RESULT else ("trial", results.describe(trial))
        entries.append(_entry(trial.folder, kind, [trial], name=name, **scored))
    return entries


def _entry(folder: Path, kind: str, trials: Sequence[TrialResult], **more: Any) -> dict[str, Any]:
    statuses = Counter(trial.status for trial in trials)
    files = [folder / SWEEP, folder / RESULT, *(trial.folder / RESULT for trial in trials)]
    written = datetime.fromtimestamp(max((path.stat().st_mtime for path in files if path.exists()), default=0.0))
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
        "changed": _distinct(trial.get("stale") for trial in trials),
        "statuses": dict(statuses),
        "when": written.astimezone().isoformat(timespec="seconds"),
        "metric": None,
        "value": None,
        "models": _distinct(t.setting("model.name_or_path") or t.record["choices"].get("model") for t in trials),
        "data": _distinct(t.setting("data.train") or t.record["choices"].get("data") for t in trials),
        "overrides": trials[0].record["overrides"] if len(trials) == 1 else [],
        **more,
    }


def _distinct(values: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(str(value) for value in values if value))


def _state(entry: dict[str, Any]) -> str:
    if entry["error"]:
        return "damaged"
    statuses = entry["statuses"]
    order = sorted(statuses, key=lambda name: (name != "completed", name))
    counted = entry["kind"] == "sweep"
    return ", ".join(f"{statuses[name]} " * counted + name.replace("_", " ") for name in order) or "empty"


def _cells(entry: dict[str, Any]) -> list[str]:
    """When, state, score, model and data; paths by their last part."""
    value = "-" if entry["value"] is None else f"{entry['metric']} {entry['value']:.4f}"
    when = datetime.fromisoformat(entry["when"]).strftime("%Y-%m-%d %H:%M")
    return [when, _state(entry), value, *(_last_parts(entry[key]) for key in ("models", "data"))]


def _last_parts(paths: list[str]) -> str:
    names = _distinct(path.rpartition("/")[2] for path in paths)
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")


def _what(entry: dict[str, Any]) -> str:
    """The folder, and what tells one entry from the next where its name does not."""
    if entry["error"]:
        return f"{entry['folder']}  {entry['error']}"
    shown_elsewhere = ("model=", "data=", "data.train=", "model.name_or_path=")
    settings = " ".join(word for word in entry["overrides"] if not word.startswith(shown_elsewhere))
    names = {"sweep": "" if Path(entry["folder"]).name == entry["name"] else entry["name"], "trial": entry["name"]}
    reasons = f"  stale: {'; '.join(entry['changed'])}" if entry["changed"] else ""
    reasons += f"  {entry['damaged']}" if entry.get("damaged") else ""
    return f"{entry['folder']}  {names.get(entry['kind'], settings)}".rstrip() + reasons

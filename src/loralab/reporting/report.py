"""``loralab report DIR``: reads the records in DIR, writes DIR/report/, returns the terminal's table."""

import csv
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.errors import ArtifactError, DiskError
from loralab.reporting.axes import lookup
from loralab.reporting.gather import STALE, Study, Trial, reason, study
from loralab.reporting.notes import general, notes
from loralab.reporting.page import page, rerun
from loralab.reporting.provenance import facts, held_fixed, question
from loralab.reporting.rows import Table, tables
from loralab.reporting.sets import subject
from loralab.reporting.table import as_plain, ended, trial_text
from loralab.reporting.text import markdown, measure, terminal
from loralab.reporting.verdicts import verdicts

# As the record has them: in a pack, memory and time are the pack's, and tokens_per_s is the trial's share.
_MEASURED = (
    *("base.fingerprint", "base.bits_per_parameter", "base.bits_per_parameter_overall", "base.bytes"),
    *("data.fingerprint", "data.targets", "adapter.trainable_parameters", "optimizer.effective_name"),
    *("memory.device", "memory.alone_peak_bytes", "memory.predicted_peak_bytes", "memory.measured_peak_bytes"),
    *("time.startup_s", "time.train_s", "time.wall_s", "time.steps", "time.tokens", "time.tokens_per_s", "pack.size"),
)


@dataclass(frozen=True)
class Report:
    """``table``: for the terminal; ``files``: what was written, by name; ``index``: the page."""

    table: str
    index: Path
    files: dict[str, Path]


def report(folder: Path) -> Report:
    """Write index.html, results.csv, results.json and report.md into ``folder/report``."""
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder; expected the folder of a sweep or of a run")
    gathered = study(folder)
    found = tables(gathered)
    texts = {
        "index.html": page(gathered, found),
        "results.csv": _csv(gathered),
        "results.json": json.dumps(_json(gathered, found), indent=1, allow_nan=False) + "\n",
        "report.md": _markdown(gathered, found),
    }
    written = {name: write_text(folder / "report" / name, text) for name, text in texts.items()}
    return Report(terminal(gathered, found), written["index.html"], written)


def write_text(path: Path, text: str) -> Path:
    """Whole or not at all. Raises DiskError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8", newline="\n")
        partial.replace(path)
    except OSError as error:
        raise DiskError(f"{path}: cannot write {len(text)} bytes: {error.strerror or error}") from error
    return path


def _csv(gathered: Study) -> str:
    """One line per trial, whatever became of it."""
    metrics = list(dict.fromkeys(name for trial in gathered.trials for name in trial.record["metrics"]))
    head = ["trial", "folder", *gathered.axes, "seed", "status", *metrics, *_MEASURED, "ended", "error"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    for trial in gathered.trials:
        record = trial.record
        line: list[Any] = [record["trial"], trial.name, *(trial.values[axis] for axis in gathered.axes)]
        line += [trial.seed, trial.status, *(record["metrics"].get(name) for name in metrics)]
        line += [*(lookup(record, key) for key in _MEASURED)]
        line += [ended(trial), "" if trial.ok else reason(trial)]
        writer.writerow(line)
    return out.getvalue()


def _json(gathered: Study, found: list[Table]) -> dict[str, Any]:
    return {
        "name": gathered.name,
        "question": gathered.question,
        "axes": gathered.axes,
        "metric": gathered.metric,
        "metric_mode": gathered.mode,
        "held_fixed": held_fixed(gathered),
        "notes": [*general(gathered, found), *(note for part, rows in found for note in notes(part, rows))],
        "arms": [as_plain(part, row) for part, rows in found for row in rows],
        "claims": [verdict.plain() for verdict in verdicts(gathered, found)],
        "trials": [_trial(trial) for trial in gathered.trials],
    }


def _trial(trial: Trial) -> dict[str, Any]:
    record = trial.record
    return {
        "trial": record["trial"],
        "folder": trial.name,
        "values": trial.values,
        "seed": record["seed"],
        "status": trial.status,
        "error": None if trial.ok else reason(trial),
        "metrics": record["metrics"],
        **{key: lookup(record, key) for key in _MEASURED},
        "stopped_early": record.get("stopped_early"),
        "ended": ended(trial),
        "environment": record["environment"],
        "overrides": record["overrides"],
    }


def _markdown(gathered: Study, found: list[Table]) -> str:
    known = facts(gathered)
    asked = question(gathered)
    lines = [f"# {gathered.name}", "", *([asked, ""] if asked else [])]
    for part, rows in found:
        lines += [f"## {subject(part)}", ""] if len(found) > 1 else []
        lines += [f"{measure(part, rows)}.", "", markdown(part, rows), *(f"- {note}" for note in notes(part, rows)), ""]
    lines += [f"- {note}" for note in general(gathered, found)]
    lines += [f"- {verdict.text}" for verdict in verdicts(gathered, found)]
    lines += [f"- held fixed: {text}" for text in held_fixed(gathered)]
    lines += [f"- {term}: {text}" for term, text in {**known.header, **known.provenance}.items() if text]
    troubled = [trial for trial in gathered.trials if not trial.ok]
    lines += ["", f"## Not completed{' or stale' * (gathered.count(STALE) > 0)}", ""] if troubled else []
    for trial in troubled:
        again = f" (`{rerun(trial)}`)" if trial.record["overrides"] else ""
        lines.append(f"- {trial_text(gathered, trial)}: {trial.status}: {reason(trial)}{again}")
    return "\n".join(lines) + "\n"

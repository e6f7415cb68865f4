"""``loralab report DIR``: reads the records in DIR, writes DIR/report/, returns the terminal's table."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.analysis.arms import Comparison, comparisons
from loralab.analysis.claims import verdicts
from loralab.analysis.comparable import subject
from loralab.analysis.dimension import answers
from loralab.analysis.results import SweepResults, read_results
from loralab.analysis.trials import STALE, TrialResult
from loralab.errors import ArtifactError, DiskError
from loralab.reporting import cost, subspace
from loralab.reporting.layout import markdown_table, terminal_width
from loralab.reporting.notes import general, messages, notes
from loralab.reporting.page import page
from loralab.reporting.provenance import facts, held_fixed, question
from loralab.reporting.table import as_plain
from loralab.reporting.text import markdown, measure, terminal

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
    results = read_results(folder)
    compared = comparisons(results)
    texts = {
        "index.html": page(results, compared),
        "results.csv": _csv(results),
        "results.json": json.dumps(_json(results, compared), indent=1, allow_nan=False) + "\n",
        "report.md": _markdown(results, compared),
    }
    written = {name: write_text(folder / "report" / name, text) for name, text in texts.items()}
    return Report(terminal(results, compared, terminal_width()), written["index.html"], written)


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


def _csv(results: SweepResults) -> str:
    """One line per trial, whatever became of it."""
    import pandas as pd

    metrics = dict.fromkeys(name for trial in results.trials for name in trial.record["metrics"])
    columns = ["trial", "folder", *results.axes, "seed", "status", *metrics, *_MEASURED, "ended", "error"]
    lines = [
        {
            **{"trial": trial.record["trial"], "folder": trial.name, **trial.values, "status": trial.status},
            **{**trial.record["metrics"], **{key: trial.get(key) for key in _MEASURED}},
            **{"ended": trial.ended, "error": "" if trial.ok else trial.reason},
        }
        for trial in results.trials
    ]
    return str(pd.DataFrame(lines, columns=columns, dtype=object).to_csv(index=False, lineterminator="\n"))


def _json(results: SweepResults, compared: Sequence[Comparison]) -> dict[str, Any]:
    return {
        "name": results.name,
        "question": results.question,
        "axes": results.axes,
        "metric": results.metric,
        "metric_mode": results.mode,
        "held_fixed": held_fixed(results),
        "notes": [*general(results, compared), *(note for comparison in compared for note in notes(comparison))],
        "arms": [
            {"set": about, **as_plain(arm), **cost.plain(arm)}
            for comparison in compared
            for about in [subject(comparison.results)]
            for arm in comparison.arms
        ],
        "claims": [verdict.plain() for verdict in verdicts(results, compared)],
        **_dimensions(compared),
        **subspace.plain(results),
        "trials": [_trial(trial) for trial in results.trials],
    }


def _dimensions(compared: Sequence[Comparison]) -> dict[str, Any]:
    """``d90``, where the sweep asks for it: an answer for each set of trials and each setting that they share."""
    found = [{"of": setting, **answer.plain()} for one in compared for setting, answer in answers(one.results).items()]
    return {"d90": found} if found else {}


def _trial(trial: TrialResult) -> dict[str, Any]:
    record = trial.record
    return {
        "trial": record["trial"],
        "folder": trial.name,
        "values": trial.values,
        "seed": record["seed"],
        "status": trial.status,
        "error": None if trial.ok else trial.reason,
        "metrics": record["metrics"],
        **{key: trial.get(key) for key in _MEASURED},
        "stopped_early": record.get("stopped_early"),
        "ended": trial.ended,
        "environment": record["environment"],
        "overrides": record["overrides"],
    }


def _markdown(results: SweepResults, compared: Sequence[Comparison]) -> str:
    provenance = facts(results)
    question_text = question(results)
    lines = [f"# {results.name}", "", *([question_text, ""] if question_text else [])]
    for comparison in compared:
        lines += [f"## {subject(comparison.results)}", ""] if len(compared) > 1 else []
        lines += [f"{measure(comparison)}.", "", markdown(comparison)]
        lines += [*(f"- {note}" for note in notes(comparison)), ""]
        titles, rows = cost.table(comparison)
        lines += [markdown_table(titles, rows), f"{cost.READING}.", ""] if rows else []
    lines += subspace.markdown(results)
    footer = [*messages(results, compared), *(f"held fixed: {text}" for text in held_fixed(results))]
    footer += [f"{term}: {text}" for term, text in {**provenance.header, **provenance.provenance}.items() if text]
    lines += [f"- {text}" for text in footer]
    troubled = [trial for trial in results.trials if not trial.ok]
    lines += ["", f"## Not completed{' or stale' * (results.count(STALE) > 0)}", ""] if troubled else []
    for trial in troubled:
        rerun = f" (`{trial.rerun}`)" if trial.record["overrides"] else ""
        lines.append(f"- {results.describe(trial)}: {trial.status}: {trial.reason}{rerun}")
    return "\n".join(lines) + "\n"

"""``loralab report DIR``: reads the records in DIR, writes DIR/report/, returns the terminal's table."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.analysis.answer import answer
from loralab.analysis.arms import Comparison, comparisons
from loralab.analysis.claims import verdicts
from loralab.analysis.comparable import subject
from loralab.analysis.dimension import answers
from loralab.analysis.effects import effects
from loralab.analysis.full import to_full
from loralab.analysis.results import SweepResults, read_results
from loralab.analysis.search import plain as of_search
from loralab.analysis.trials import PRUNED, STALE, TrialResult
from loralab.errors import ArtifactError, DiskError
from loralab.reporting import cost, subspace
from loralab.reporting.charts import Figure
from loralab.reporting.latex import TABLE, latex
from loralab.reporting.layout import markdown_table, markdown_text, terminal_width
from loralab.reporting.notes import general, messages, notes
from loralab.reporting.page import page
from loralab.reporting.provenance import facts, held_fixed, question
from loralab.reporting.table import as_plain, plain_gap
from loralab.reporting.text import markdown, measure, terminal
from loralab.reporting.trials import MEASURED, columns
from loralab.reporting.vega import drawn

KINDS = ("svg", "png", "pdf")
MOST_DRAWN = 500  # trials, above which figures are written as SVG alone: a PNG of many lines takes seconds


@dataclass(frozen=True)
class Report:
    """``table``: for the terminal; ``files``: what was written, by name; ``index``: the page; and what they show."""

    table: str
    index: Path
    files: dict[str, Path]
    results: SweepResults
    compared: Sequence[Comparison]
    figures: Sequence[Figure]


def report(folder: Path, kinds: Sequence[str] = KINDS[:1], tex: bool = False) -> Report:
    """Write index.html, results.csv, results.json, report.md and figures/ into ``folder/report``; ``kinds``: of the
    figures' files, of svg, png and pdf (of very many trials svg alone); ``tex``: table.tex as well, which is written
    anew wherever it is there. Files of figures that are no longer drawn are removed."""
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder; expected the folder of a sweep or of a run")
    results = read_results(folder)
    compared = comparisons(results)
    made = page(results, compared)
    texts = {
        "index.html": made.text,
        "results.csv": _csv(results),
        "results.json": json.dumps(_json(results, compared), indent=1, allow_nan=False) + "\n",
        "report.md": _markdown(results, compared),
        **({TABLE: latex(compared)} if tex or (folder / "report" / TABLE).exists() else {}),
    }
    written = {name: write_text(folder / "report" / name, text) for name, text in texts.items()}
    kinds = kinds if len(results.trials) <= MOST_DRAWN else KINDS[:1]
    write_figures(folder / "report" / "figures", made.figures, kinds)
    table = terminal(results, compared, terminal_width())
    return Report(table, written["index.html"], written, results, compared, made.figures)


def write_figures(folder: Path, figures: Sequence[Figure], kinds: Sequence[str]) -> None:
    """A file of each kind for each figure, and none that an earlier report left. Raises DiskError."""
    contents = {f"{figure.name}.{kind}": drawn(figure.spec, kind) for figure in figures for kind in kinds}
    for name, content in contents.items():
        _write(folder / name, content)
    for left in folder.glob("*.*"):
        if left.suffix[1:] in KINDS and left.name not in contents:
            left.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """Whole or not at all. Raises DiskError."""
    return _write(path, text.encode("utf-8"))


def _write(path: Path, content: bytes) -> Path:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise DiskError(f"{path}: cannot write {len(content)} bytes: {error.strerror or error}") from error
    return path


def _csv(results: SweepResults) -> str:
    """One line per trial, whatever became of it."""
    import pandas as pd

    return str(pd.DataFrame(columns(results), dtype=object).to_csv(index=False, lineterminator="\n"))


def _json(results: SweepResults, compared: Sequence[Comparison]) -> dict[str, Any]:
    return {
        "name": results.name,
        "question": results.question,
        "answer": "" if results.single else answer(compared),
        "axes": results.axes,
        "metric": results.metric,
        "metric_mode": results.mode,
        "held_fixed": held_fixed(results),
        "notes": [*general(results, compared), *(note for comparison in compared for note in notes(comparison))],
        "arms": [
            {"set": about, **as_plain(arm), **cost.plain(arm), **(plain_gap(gaps.get(id(arm))) if gaps else {})}
            for comparison in compared
            for about, gaps in [(subject(comparison.results), to_full(comparison))]
            for arm in comparison.arms
        ],
        "claims": [verdict.plain() for verdict in verdicts(results, compared)],
        "effects": [] if results.single else [effects(comparison).plain() for comparison in compared],
        **_dimensions(compared),
        **of_search(results, compared),
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
        "error": None if trial.ok or trial.status == PRUNED else trial.reason,
        "metrics": record["metrics"],
        **{key: trial.get(key) for key in MEASURED},
        "stopped_early": record.get("stopped_early"),
        "ended": trial.ended,
        "environment": record["environment"],
        "overrides": record["overrides"],
    }


def _markdown(results: SweepResults, compared: Sequence[Comparison]) -> str:
    provenance = facts(results)
    found = "" if results.single else answer(compared)
    lines = [
        f"# {markdown_text(results.name)}",
        "",
        *(line for text in (question(results), found) if text for line in (text, "")),
    ]
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
    troubled = [trial for trial in results.trials if not trial.ok and trial.status != PRUNED]
    lines += ["", f"## Not completed{' or stale' * (results.count(STALE) > 0)}", ""] if troubled else []
    for trial in troubled:
        rerun = f" (`{trial.rerun}`)" if trial.record["overrides"] else ""
        lines.append(f"- {results.describe(trial)}: {trial.status}: {trial.reason}{rerun}")
    return "\n".join(lines) + "\n"

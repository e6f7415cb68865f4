"""What the arms generated for the same rows, side by side."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loralab.analysis.arms import Arm, Comparison
from loralab.analysis.trials import TrialResult
from loralab.analysis.tuning import TEST
from loralab.analysis.values import Json
from loralab.reporting.html import Section, render

PREDICTIONS = "predictions.jsonl"
MOST_ROWS = 5
MOST_ARMS = 12
LONG = 240  # characters, of which a text shows the first ones, the rest unfolded
LONGEST = 4000  # characters of an unfolded text; the file has all

Key = tuple[int, str, str]  # place of the row in its split, prompt, target


@dataclass(frozen=True)
class Text:
    """``start``: what is shown at once; ``whole``: what unfolds, empty where ``start`` is all."""

    start: str
    whole: str = ""


@dataclass(frozen=True)
class Sample:
    """One row: ``predictions``: (name of the arm, its text; None where it has not generated this row, exact match)."""

    title: str
    prompt: Text
    target: Text
    predictions: list[tuple[str, Text | None, bool]]


def section(comparison: Comparison) -> Section | None:
    """The first rows that were generated, with what each arm's first seed made of them; None where no trial has any."""
    kept = [(arm, trial, rows) for arm in comparison.arms for trial, rows in _first(arm)]
    if not kept:
        return None
    split = _split(comparison.results.metric, [rows for _, _, rows in kept])
    shown = [(arm.name, _of_split(rows, split)) for arm, _, rows in kept[:MOST_ARMS]]
    keys = list(dict.fromkeys(key for _, by_key in shown for key in by_key))[:MOST_ROWS]
    seeds = ", ".join(dict.fromkeys(trial.seed for _, trial, _ in kept))
    return Section(
        render(
            "samples.html",
            samples=[_sample(key, split, shown) for key in keys],
            notes=list(_notes(comparison, split, seeds, len(kept))),
        )
    )


def _first(arm: Arm) -> list[tuple[TrialResult, list[Json]]]:
    """The first completed trial of the arm with its generated rows; empty where it has none."""
    return [(trial, rows) for trial in arm.ok[:1] if (rows := read(trial))]


def read(trial: TrialResult) -> list[Json]:
    """The objects of its predictions.jsonl that are whole; empty where there is no such file."""
    try:
        lines = (trial.folder / PREDICTIONS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    rows = [row for line in lines if isinstance(row := _json(line), dict)]
    return [row for row in rows if isinstance(row.get("row"), int) and isinstance(row.get("prediction"), str)]


def _json(line: str) -> object:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _split(metric: str, kept: Sequence[list[Json]]) -> str:
    """The split that the table's metric is of, where any was generated; else the first that was."""
    own = "test" if metric.startswith(TEST) else "validation"
    found = dict.fromkeys(str(row.get("split")) for rows in kept for row in rows)
    return own if own in found else next(iter(found))


def _of_split(rows: Sequence[Json], split: str) -> dict[Key, str]:
    own = [row for row in rows if str(row.get("split")) == split]
    return {(row["row"], str(row.get("prompt", "")), str(row.get("target", ""))): row["prediction"] for row in own}


def _sample(key: Key, split: str, shown: Sequence[tuple[str, Mapping[Key, str]]]) -> Sample:
    place, prompt, target = key
    found = [(name, by_key.get(key)) for name, by_key in shown]
    predictions = [
        (name, None if text is None else _folded(text), text is not None and text.strip() == target.strip())
        for name, text in found
    ]
    return Sample(f"Row {place} of the {split} split", _folded(prompt), _folded(target), predictions)


def _folded(text: str) -> Text:
    if len(text) <= LONG:
        return Text(text)
    cut = f"\n[{len(text) - LONGEST:,} more characters: see {PREDICTIONS}]" if len(text) > LONGEST else ""
    return Text(f"{text[:LONG]}...", text[:LONGEST] + cut)


def _notes(comparison: Comparison, split: str, seeds: str, count: int) -> list[str]:
    which = "the chosen value's trial of the first seed" if comparison.tuned is not None else "the first seed's trial"
    notes = [
        f"Of each row of the table, {which} (seed {seeds}), on the first rows of the {split} split that it generated; "
        "exact: the text is the target, white space around both left out. A few rows are an impression, no measurement"
    ]
    if count > MOST_ARMS:
        notes.append(f"The first {MOST_ARMS} of {count} rows of the table; each trial's folder has its {PREDICTIONS}")
    return notes

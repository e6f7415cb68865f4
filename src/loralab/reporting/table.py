"""Trials to rows: one row per configuration, averaged over its seeds and nothing else."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

from loralab.reporting.axes import identity, lookup, short_names
from loralab.reporting.gather import Study, Trial, reason

WIDTH = 100
MIB, GIB = 2**20, 2**30
# Columns that go first when the terminal is narrow; the axes, the metric and the seeds always stay.
_EXPENDABLE = ("predicted peak", "tokens/s", "peak memory", "trainable", "bits/param", "train s")
_BROKEN = ("out_of_memory", "diverged")  # counted as failed; each is named below the table


@dataclass(frozen=True)
class Row:
    """One configuration. ``scores``: the metric per completed seed."""

    values: dict[str, str]
    trials: list[Trial]
    scores: list[float]
    best: bool = False

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.scores) if self.scores else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds (n - 1); None for fewer than two."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def ok(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.ok]

    @property
    def packed(self) -> bool:
        return any((lookup(trial.record, "pack.size") or 1) > 1 for trial in self.ok)

    def average(self, key: str) -> float | None:
        """Mean of a record's number over the completed seeds, for example ``time.train_s``."""
        found = self._numbers(key)
        return statistics.fmean(found) if found else None

    def largest(self, key: str) -> float | None:
        """The largest over the seeds: what a machine must have for all of them."""
        return max(self._numbers(key), default=None)

    def _numbers(self, key: str) -> list[float]:
        found = [lookup(trial.record, key) for trial in self.ok]
        return [float(value) for value in found if isinstance(value, int | float)]


@dataclass(frozen=True)
class Column:
    """A column of the results: ``number`` sorts, ``text`` shows."""

    title: str
    text: Callable[[Row], str]
    number: Callable[[Row], float | None]


def rows(study: Study) -> list[Row]:
    """One row per configuration, in the order of the axes, the best mean marked."""
    groups: dict[str, list[Trial]] = {}
    for trial in study.trials:
        groups.setdefault(_group(study, trial), []).append(trial)
    found = [_row(study, trials) for trials in groups.values()]
    found.sort(key=lambda row: [_position(labels, row.values[axis]) for axis, labels in study.axes.items()])
    return _mark_best(found, study.mode)


def score(trial: Trial, metric: str) -> float | None:
    value = trial.record["metrics"].get(metric)
    return float(value) if trial.ok and isinstance(value, int | float) else None


def columns(study: Study, found: Sequence[Row]) -> list[Column]:
    """The measured columns that any row can fill."""
    every = [
        _column("bits/param", lambda row: row.average("base.bits_per_parameter"), "{:.3f}".format),
        _column("trainable", lambda row: row.average("adapter.trainable_parameters"), "{:,.0f}".format),
        _column("predicted peak", lambda row: row.largest("memory.predicted_peak_bytes"), memory),
        _column("peak memory", lambda row: row.largest("memory.measured_peak_bytes"), memory),
        _column("train s", lambda row: row.average("time.train_s"), "{:.1f}".format),
        _column("tokens/s", lambda row: row.average("time.tokens_per_s"), "{:,.0f}".format),
    ]
    return [column for column in every if any(column.number(row) is not None for row in found)]


def seeds_text(row: Row) -> str:
    """``2 ok``, ``1 ok, 1 failed``; nothing that went wrong is left out."""
    counts: dict[str, int] = {}
    for trial in row.trials:
        name = "ok" if trial.ok else "failed" if trial.status in _BROKEN else trial.status
        counts[name] = counts.get(name, 0) + 1
    unscored = len(row.ok) - len(row.scores)
    if unscored:
        counts["of them without the metric"] = unscored
    return ", ".join(f"{counts[name]} {name}" for name in sorted(counts, key=lambda name: name != "ok"))


def score_text(row: Row) -> str:
    if row.mean is None:
        return "-"
    return f"{row.mean:.4f}" if row.std is None else f"{row.mean:.4f} +- {row.std:.4f}"


def memory(size: float) -> str:
    """Bytes in binary units (MiB = 2**20)."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"


def trial_text(study: Study, trial: Trial) -> str:
    """``quantization=nf4 r=8 seed=1``."""
    short = short_names(list(study.axes))
    pairs = [f"{short[axis]}={trial.values[axis]}" for axis in study.axes]
    return " ".join([*pairs, f"seed={trial.seed}"])


def terminal(study: Study, found: Sequence[Row], width: int = WIDTH) -> str:
    """The results as plain text, at most ``width`` columns wide."""
    better = "lower" if study.mode == "min" else "higher"
    lines = wrap(f"{study.name}: {study.question}" if study.question else study.name, width)
    lines += wrap(f"{study.metric}: mean +- standard deviation over seeds, {better} is better", width)
    lines += ["", *_fit(study, found, width)]
    notes = [f"{trial.status}: {trial_text(study, trial)}: {reason(trial)}" for trial in study.broken]
    if any(row.packed for row in found):
        notes.insert(0, "(p) trained in a pack: memory and time are the pack's")
    lines += ["", *(clip(note, width) for note in notes)] if notes else []
    return "\n".join(line.rstrip() for line in lines) + "\n"


def markdown(study: Study, found: Sequence[Row]) -> str:
    """The same table for a README or an issue."""
    titles, body = _cells(study, found, columns(study, found))
    lines = [titles, ["---"] * len(titles), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def clip(text: str, width: int) -> str:
    """Printable, on one line, no longer than ``width``."""
    flat = "".join(letter if letter.isprintable() else " " for letter in text)
    return flat if len(flat) <= width else flat[: width - 3] + "..."


def _column(title: str, number: Callable[[Row], float | None], show: Callable[[float], str]) -> Column:
    def text(row: Row) -> str:
        value = number(row)
        return "-" if value is None else show(value)

    return Column(title, text, number)


def _group(study: Study, trial: Trial) -> str:
    if trial.record["config"]:
        return identity(trial.record)
    alike = (other for other in study.trials if other.record["config"] and _same_place(study, trial, other))
    twin = next(alike, None)
    return identity(twin.record) if twin else repr([trial.values[axis] for axis in study.axes])


def _same_place(study: Study, one: Trial, other: Trial) -> bool:
    return "?" not in one.values.values() and all(one.values[a] == other.values[a] for a in study.axes)


def _row(study: Study, trials: list[Trial]) -> Row:
    scores = [score(trial, study.metric) for trial in trials]
    known = [value for value in scores if value is not None]
    return Row({axis: trials[0].values[axis] for axis in study.axes}, trials, known)


def _position(labels: list[str], value: str) -> int:
    return labels.index(value) if value in labels else len(labels)


def _mark_best(found: list[Row], mode: str) -> list[Row]:
    means = [row.mean for row in found if row.mean is not None]
    if len(means) < 2:
        return found
    best = min(means) if mode == "min" else max(means)
    return [Row(row.values, row.trials, row.scores, best=row.mean == best) for row in found]


def _cells(study: Study, found: Sequence[Row], shown: Sequence[Column]) -> tuple[list[str], list[list[str]]]:
    short = short_names(list(study.axes))
    titles = [*(short[axis] for axis in study.axes), study.metric, *(c.title for c in shown), "seeds"]
    body = []
    for row in found:
        mark = " *" if row.best else ""
        measured = [column.text(row) + (" (p)" if _is_packs(column, row) else "") for column in shown]
        body.append([*row.values.values(), score_text(row) + mark, *measured, seeds_text(row)])
    return titles, body


def _is_packs(column: Column, row: Row) -> bool:
    return row.packed and column.title in ("peak memory", "train s", "tokens/s")


def _fit(study: Study, found: Sequence[Row], width: int) -> list[str]:
    """Leave out the expendable columns one by one, then clip the axes' labels, until the table fits."""
    shown = columns(study, found)
    for title in ("", *_EXPENDABLE):
        shown = [column for column in shown if column.title != title]
        lines = align(*_cells(study, found, shown), numeric_from=len(study.axes))
        if max(map(len, lines)) <= width:
            return lines
    titles, body = _cells(study, found, shown)
    spare = width - sum(max(len(line[i]) for line in [titles, *body]) + 2 for i in (-2, -1))
    room = max(4, spare // max(1, len(study.axes)) - 2)
    axes = len(study.axes)
    clipped = [[*(clip(cell, room) for cell in line[:axes]), *line[axes:]] for line in [titles, *body]]
    return [clip(line, width) for line in align(clipped[0], clipped[1:], numeric_from=axes)]


def align(titles: list[str], body: list[list[str]], numeric_from: int) -> list[str]:
    """Lines of equal columns; those between ``numeric_from`` and the last one are set to the right."""
    table = [titles, *body]
    widths = [max(len(line[column]) for line in table) for column in range(len(titles))]
    last = len(titles) - 1

    def cell(text: str, column: int) -> str:
        right = numeric_from < column < last
        return text.rjust(widths[column]) if right else text.ljust(widths[column])

    lines = ["  ".join(cell(text, column) for column, text in enumerate(line)) for line in table]
    return [lines[0], "-" * len(lines[0].rstrip()), *lines[1:]]


def as_plain(study: Study, row: Row) -> dict[str, Any]:
    """A row for results.json."""
    return {
        "values": row.values,
        "metric": study.metric,
        "mean": row.mean,
        "std": row.std,
        "n": len(row.scores),
        "scores": row.scores,
        "best": row.best,
        "packed": row.packed,
        "bits_per_parameter": row.average("base.bits_per_parameter"),
        "trainable_parameters": row.average("adapter.trainable_parameters"),
        "predicted_peak_bytes": row.largest("memory.predicted_peak_bytes"),
        "measured_peak_bytes": row.largest("memory.measured_peak_bytes"),
        "train_s": row.average("time.train_s"),
        "tokens_per_s": row.average("time.tokens_per_s"),
        "seeds": [trial.seed for trial in row.trials],
        "statuses": [trial.status for trial in row.trials],
        "trials": [trial.record["trial"] for trial in row.trials],
    }

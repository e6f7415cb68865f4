"""Trials to rows: one row per configuration, averaged over its seeds and nothing else."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loralab.reporting.axes import identity, lookup, short_names
from loralab.reporting.gather import Study, Trial, comparable
from loralab.reporting.paired import Difference, paired

MIB, GIB = 2**20, 2**30
VERSUS = "vs baseline"
_BROKEN = ("out_of_memory", "diverged")  # counted as failed; each is named below the table


@dataclass(frozen=True)
class Row:
    """One configuration. ``by_seed``: the metric of each completed seed; ``difference``: to the baseline row."""

    values: dict[str, str]
    trials: list[Trial]
    by_seed: dict[str, float]
    best: bool = False
    baseline: bool = False
    difference: Difference | None = None

    @property
    def scores(self) -> list[float]:
        return list(self.by_seed.values())

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

    def trained(self, key: str) -> float | None:
        """The mean, where there was any training to measure."""
        return None if self.average("time.steps") == 0 else self.average(key)

    def measured(self, name: str) -> float | None:
        """Mean of another metric over the completed seeds."""
        found = [value for trial in self.trials if (value := score(trial, name)) is not None]
        return statistics.fmean(found) if found else None

    def _numbers(self, key: str) -> list[float]:
        found = [lookup(trial.record, key) for trial in self.ok]
        return [float(value) for value in found if isinstance(value, int | float)]


@dataclass(frozen=True)
class Column:
    """A column of the results: ``number`` sorts, ``text`` shows."""

    title: str
    text: Callable[[Row], str]
    number: Callable[[Row], float | None]


Table = tuple[Study, list[Row]]


def tables(study: Study) -> list[Table]:
    """A table for each set of trials that may be compared."""
    return [(part, rows(part)) for part in comparable(study)]


def rows(study: Study) -> list[Row]:
    """One row per configuration in the order of the axes: first the baseline, the first value of every axis."""
    groups: dict[str, list[Trial]] = {}
    for trial in study.trials:
        groups.setdefault(_group(study, trial), []).append(trial)
    found = [_row(study, trials) for trials in groups.values()]
    found.sort(key=lambda row: [_position(labels, row.values[axis]) for axis, labels in study.axes.items()])
    return _mark_best(_compared(found), study.mode)


def score(trial: Trial, metric: str) -> float | None:
    value = trial.record["metrics"].get(metric)
    return float(value) if trial.ok and isinstance(value, int | float) else None


def columns(study: Study, found: Sequence[Row]) -> list[Column]:
    """The measured columns that any row can fill."""
    every = [
        Column(VERSUS, _difference_text, lambda row: row.difference.mean if row.difference else None),
        *(_metric_column(name) for name in _other_metrics(study)),
        _column("bits/param", lambda row: row.average("base.bits_per_parameter"), "{:.3f}".format),
        _column("base size", lambda row: row.average("base.bytes"), memory),
        _column("trainable", lambda row: row.average("adapter.trainable_parameters"), "{:,.0f}".format),
        _column("predicted peak", lambda row: row.largest("memory.predicted_peak_bytes"), memory),
        _column("peak memory", lambda row: row.largest("memory.measured_peak_bytes"), memory),
        _column("train s", lambda row: row.trained("time.train_s"), "{:.1f}".format),
        _column("tokens/s", lambda row: row.trained("time.tokens_per_s"), "{:,.0f}".format),
    ]
    return [column for column in every if any(column.number(row) is not None for row in found)]


def seeds_text(row: Row) -> str:
    """``2 ok``, ``1 ok, 1 failed``; nothing that went wrong is left out."""
    counts: dict[str, int] = {}
    for trial in row.trials:
        name = "ok" if trial.ok else "failed" if trial.status in _BROKEN else trial.status
        counts[name] = counts.get(name, 0) + 1
    unscored = sum(trial.seed not in row.by_seed for trial in row.ok)
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


def where(study: Study, row: Row) -> str:
    """``quantization = nf4, r = 8``."""
    short = short_names(list(study.axes))
    known = [f"{short[axis]} = {text}" for axis, text in row.values.items() if text != "?"]
    return ", ".join(known) or "the only row"


def deviates(found: Sequence[Row]) -> bool:
    """Whether there is a standard deviation to speak of."""
    return any(row.std is not None for row in found)


def _difference_text(row: Row) -> str:
    return "baseline" if row.baseline else row.difference.text if row.difference else "-"


def _other_metrics(study: Study) -> list[str]:
    """What else a single run measured; a sweep's are in its CSV."""
    found = study.trials[0].record["metrics"] if study.single else {}
    return [name for name, value in found.items() if name != study.metric and isinstance(value, int | float)]


def _metric_column(name: str) -> Column:
    return _column(name, lambda row: row.measured(name), "{:.4f}".format)


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
    by_seed = {trial.seed: value for trial in trials if (value := score(trial, study.metric)) is not None}
    return Row({axis: trials[0].values[axis] for axis in study.axes}, trials, by_seed)


def _position(labels: list[str], value: str) -> int:
    return labels.index(value) if value in labels else len(labels)


def _compared(found: list[Row]) -> list[Row]:
    """Every row less the first that has a result, seed by seed."""
    first = next((row for row in found if row.scores), None)
    if first is None or len(found) < 2:
        return found
    return [
        replace(row, baseline=True) if row is first else replace(row, difference=paired(row.by_seed, first.by_seed))
        for row in found
    ]


def _mark_best(found: list[Row], mode: str) -> list[Row]:
    """The best mean, where it is one of several seeds: a single run's may be its luck."""
    means = [row.mean for row in found if row.mean is not None]
    if len(means) < 2:
        return found
    best = min(means) if mode == "min" else max(means)
    return [replace(row, best=row.mean == best and len(row.scores) > 1) for row in found]


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
        "baseline": row.baseline,
        "difference": _plain_difference(row),
        "packed": row.packed,
        "bits_per_parameter": row.average("base.bits_per_parameter"),
        "base_bytes": row.average("base.bytes"),
        "trainable_parameters": row.average("adapter.trainable_parameters"),
        "predicted_peak_bytes": row.largest("memory.predicted_peak_bytes"),
        "measured_peak_bytes": row.largest("memory.measured_peak_bytes"),
        "train_s": row.average("time.train_s"),
        "tokens_per_s": row.average("time.tokens_per_s"),
        "seeds": [trial.seed for trial in row.trials],
        "statuses": [trial.status for trial in row.trials],
        "trials": [trial.record["trial"] for trial in row.trials],
    }


def _plain_difference(row: Row) -> dict[str, Any] | None:
    """``low`` and ``high``: the 95% interval of the mean paired difference."""
    if row.difference is None:
        return None
    mean, reach, seeds = row.difference.mean, row.difference.reach, row.difference.seeds
    ends = (None, None) if reach is None else (mean - reach, mean + reach)
    return {"mean": mean, "low": ends[0], "high": ends[1], "n": len(seeds), "seeds": seeds}

"""The trials of a page: what results.csv has of each, by column, for the page's table and its explorer."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loralab.analysis.arms import Comparison
from loralab.analysis.results import SweepResults
from loralab.analysis.trials import PRUNED, TrialResult
from loralab.analysis.values import Json, as_number, is_number
from loralab.records.shared import kept
from loralab.reporting.charts import rounded
from loralab.reporting.table import MIB

# As the record has them: in a pack, memory and time are the pack's, and tokens_per_s is the trial's share.
MEASURED = (
    *("base.fingerprint", "base.bits_per_parameter", "base.bits_per_parameter_overall", "base.bytes"),
    *("data.fingerprint", "data.targets", "adapter.trainable_parameters", "optimizer.effective_name"),
    *("memory.device", "memory.alone_peak_bytes", "memory.predicted_peak_bytes", "memory.measured_peak_bytes"),
    *("time.startup_s", "time.train_s", "time.wall_s", "time.steps", "time.tokens", "time.tokens_per_s", "pack.size"),
)
FILES = ("result.json", "train.log", "metrics.jsonl", "predictions.jsonl")
MANY = 2000  # trials, above which a page's times and bytes have six digits, and its Vega is packed
# What a pack measures is of all its trials at once, and compares with nothing outside it.
OF_THE_PACK = ("memory.predicted_peak_bytes", "memory.measured_peak_bytes", "time.")
QUANTITIES = {  # column: title with its unit, divisor
    "base.bits_per_parameter": ("bits per parameter of the quantized layers", 1),
    "base.bits_per_parameter_overall": ("bits per parameter over all weights", 1),
    "base.bytes": ("base size (MiB)", MIB),
    "adapter.trainable_parameters": ("trainable parameters", 1),
    "memory.alone_peak_bytes": ("predicted peak memory, alone (MiB)", MIB),
    "memory.predicted_peak_bytes": ("predicted peak memory of the measured step (MiB)", MIB),
    "memory.measured_peak_bytes": ("measured peak memory (MiB)", MIB),
    "time.startup_s": ("start-up (s)", 1),
    "time.train_s": ("training time (s)", 1),
    "time.wall_s": ("running time (s)", 1),
    "time.steps": ("optimizer steps", 1),
    "time.tokens": ("training tokens", 1),
    "time.tokens_per_s": ("tokens per second", 1),
}
HIGHER = ("accuracy", "rouge", "bleu", "f1", "match", "matthews", "pearson", "spearman", "tokens_per_s", "correlation")


@kept
def columns(results: SweepResults) -> dict[str, list[Any]]:
    """The columns of results.csv, of each trial a value, whatever became of it; None where it has none."""
    trials = results.trials
    metrics = dict.fromkeys(name for trial in trials for name in trial.record["metrics"])
    found: dict[str, list[Any]] = {
        "trial": [trial.record["trial"] for trial in trials],
        "folder": [trial.name for trial in trials],
        **{axis: [trial.values.get(axis) for trial in trials] for axis in [*results.axes, "seed"]},
        "status": [trial.status for trial in trials],
        **{name: [trial.record["metrics"].get(name) for trial in trials] for name in metrics},
    }
    for key in MEASURED:
        section, _, name = key.partition(".")
        found[key] = [trial.record[section].get(name) for trial in trials]
    errors = ["" if trial.ok or trial.status == PRUNED else trial.reason for trial in trials]
    return found | {"ended": [trial.ended for trial in trials], "error": errors}


def stored(results: SweepResults, comparisons: Sequence[Comparison]) -> Json:
    """For the page's script. ``columns``: key, title, whether the table shows it and whether it is a quantity;
    ``values``: of each column a list, or ``{"all": value}``; beside those of results.csv ``set`` (the number of the
    table, null for a trial that was not chosen), ``arm`` (the row), ``path`` (of the folder, from the page), ``files``
    in it and ``rerun``."""
    found = columns(results)
    places = {
        trial.folder: (number, arm.name)
        for number, one in enumerate(comparisons)
        for arm in one.arms
        for trial in arm.trials
    }
    tested = [one.results.metric for one in comparisons if one.tuned is not None][:1]
    shown = [*results.axes, "seed", "status", "trial", results.metric, *tested, "time.steps", "ended"]
    shown = [name for name in shown if name in found]
    names = [*shown, *(name for name in found if name not in shown)]
    many = len(results.trials) > MANY
    values: dict[str, list[Any]] = {
        name: [_plain(value, many and name in MEASURED) for value in found[name]] for name in names
    }
    placed = [places.get(trial.folder, (None, "")) for trial in results.trials]
    values |= {
        "set": [number for number, _ in placed],
        "arm": [name for _, name in placed],
        "path": [_path(results.folder, trial) for trial in results.trials],
        "files": [_files(trial) for trial in results.trials],
        "rerun": [trial.rerun if trial.record["overrides"] else "" for trial in results.trials],
    }
    about = [
        {
            "key": name,
            "title": results.short.get(name, _TITLES.get(name, name)),
            "shown": name in shown,
            "number": _is_quantity(values[name]),
        }
        for name in names
    ]
    return {"columns": about, "values": _packed(values)}


_TITLES = {"time.steps": "steps"}


def quantities(results: SweepResults) -> dict[str, Json]:
    """What an axis of the explorer can be, by column: its title with its unit, its divisor, which way is better
    (None: neither), and whether a pack's number counts."""
    values = columns(results)
    skipped = ("trial", "folder", "seed", "pack.size", "error", "status", "ended")
    found = {}
    for name in [results.metric, *values]:
        known = [value for value in values.get(name, ()) if value is not None]
        is_axis = name in results.axes
        numeric = [as_number(str(value)) if is_axis else value for value in known]
        if name in skipped or not numeric or not all(is_number(value) for value in numeric):
            continue
        title, divisor = QUANTITIES.get(name, (results.short.get(name, name), 1))
        alone = name.startswith(OF_THE_PACK) and name not in ("time.steps", "time.tokens")
        found[name] = {"title": title, "divisor": divisor, "better": _better(results, name), "alone": alone}
    return found


def _better(results: SweepResults, name: str) -> str | None:
    if name == results.metric:
        return results.better
    if name in results.axes or name in ("time.steps", "time.tokens"):
        return None
    return "higher" if any(word in name for word in HIGHER) else "lower"


def _is_quantity(values: Sequence[Any]) -> bool:
    known = [value for value in values if value not in (None, "")]
    return bool(known) and all(
        is_number(value) or (isinstance(value, str) and as_number(value) is not None) for value in known
    )


def _plain(value: Any, short: bool) -> Any:
    """As JSON has it: what is no finite number is none."""
    if isinstance(value, float):
        finite = rounded(value)
        return finite if short else None if finite is None else value
    return value if value is None or isinstance(value, int | bool | str) else str(value)


def _packed(values: dict[str, list[Any]]) -> Json:
    """Columns of one value, and those that are equal to an earlier one, are not written out."""
    packed: Json = {}
    for name, column in values.items():
        like = next((other for other in packed if name != other and values[other] == column), None)
        short = constant(column)
        packed[name] = {"as": like} if like and short is column else short
    return packed


def constant(values: list[Any]) -> Any:
    """``{"all": value}`` where all are equal, else the list itself."""
    return {"all": values[0]} if len(values) > 1 and all(value == values[0] for value in values) else values


def _files(trial: TrialResult) -> list[str]:
    """Those of FILES that its folder has."""
    try:
        with os.scandir(trial.folder) as entries:
            found = {entry.name for entry in entries}
    except OSError:
        return []
    return [name for name in FILES if name in found]


def _path(folder: Path, trial: TrialResult) -> str:
    """The trial's folder as seen from the page in ``folder/report``; empty where it lies beside that by its name."""
    if trial.folder.parent == folder:
        return ""
    path = Path(os.path.relpath(trial.folder, folder / "report")).as_posix()
    return "" if path == f"../{trial.name}" else path


def average(trials: Sequence[TrialResult], name: str, about: Mapping[str, Any]) -> float | None:
    """The mean over the trials that have the number and, where that is a process's, ran alone."""
    counted = [trial for trial in trials if not about["alone"] or trial.pack is None]
    values = [metrics[name] if name in (metrics := trial.record["metrics"]) else trial.get(name) for trial in counted]
    known = [float(value) for value in values if is_number(value)]
    return sum(known) / len(known) if known else None

"""Records as Python and a notebook have them: the content of result.json with its folder, shown as a table."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from loralab.records import wandb_run

MIB = 2**20


class TrialRecord(dict[str, Any]):
    """The record of one trial, with the keys of result.json: ``record["metrics"]["val/loss"]``."""

    def __init__(self, content: Mapping[str, Any], folder: Path) -> None:
        super().__init__(content)
        self.folder = folder  # the run's: absolute

    @property
    def name(self) -> str:
        """The swept axes with this trial's values; of a single run all its settings."""
        return wandb_run.run_name(self.folder, self)

    @property
    def status(self) -> str:
        """completed, failed, out_of_memory, diverged, interrupted or pruned."""
        return str(self["status"])

    @property
    def metrics(self) -> dict[str, float]:
        """Of the final state, by their names, such as ``val/loss``."""
        return dict(self["metrics"] or {})

    def _repr_html_(self) -> str:
        return html_table(["", self.name], [[key, value] for key, value in _row(self).items() if key != "name"])


class TrialRecords(list[TrialRecord]):
    """The records of a sweep's trials, in their order."""

    def _repr_html_(self) -> str:
        rows = [_row(record) for record in self]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        return html_table(columns, [[row.get(key) for key in columns] for row in rows])


def _row(record: TrialRecord) -> dict[str, Any]:
    """What is told of a trial in a notebook; of what is not known, nothing."""
    peak, size = record["memory"]["alone_peak_bytes"], record["pack"]["size"] or 1
    row = {
        "name": record.name,
        "trial": record["trial"],
        "status": record.status,
        **record.metrics,
        "trainable parameters": record["adapter"]["trainable_parameters"],
        "bits per parameter": record["base"]["bits_per_parameter"],
        "peak alone, MiB": None if peak is None else round(peak / MIB, 1),
        "training, s" if size == 1 else "training of its pack, s": record["time"]["train_s"],
        "error": record["error"],
    }
    return {key: value for key, value in row.items() if value is not None}


def html_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """An HTML table; numbers stand right, with a separator of thousands or five significant digits."""
    head = "".join(f"<th>{escape(str(column))}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    if isinstance(value, bool | str | None):
        return f'<td style="text-align: left">{escape("" if value is None else str(value))}</td>'
    text = f"{value:,}" if isinstance(value, int) else f"{value:.5g}"
    return f'<td style="text-align: right">{text}</td>'

"""Measurements as they come in, on disk after each, and as Markdown tables."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from loralab.bench.worker import Row

OURS = "loralab"


class Table:
    """The rows of one part. A row is a library at a task (``what``); its ratio is to loralab at the same task."""

    def __init__(self, save: Callable[[], None]) -> None:
        self.rows: list[Row] = []
        self._save = save
        self._values: dict[tuple[str, str], list[float]] = {}

    def row(self, name: str, what: str, unit: str, **about: Any) -> Row:
        """The row of that name and task, made at first use."""
        found = next((one for one in self.rows if (one["name"], one["what"]) == (name, what)), None)
        if found is None:
            found = {"name": name, "what": what, "unit": unit, "median": None, "quartiles": None, "ratio": None}
            found.update(measurements=0, **about)
            self.rows.append(found)
        return found

    def add(self, row: Row, values: Iterable[float], **about: Any) -> None:
        """Further measurements of a row, and what else is known of it."""
        held = self._values.setdefault((row["name"], row["what"]), [])
        held += values
        row.update(about, median=statistics.median(held), quartiles=quartiles(held), measurements=len(held))
        group = [one for one in self.rows if one["what"] == row["what"]]
        ours = next((one["median"] for one in group if one["name"] == OURS), None)
        for one in group:
            one["ratio"] = one["median"] / ours if ours and one["median"] else None
        self._save()

    def fail(self, row: Row, error: Exception) -> None:
        """In place of what a side could not do."""
        row["error"] = str(error)
        self._save()


def quartiles(values: Sequence[float]) -> list[float]:
    """The first and the third; of one value, that value."""
    if len(values) == 1:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def render(found: Mapping[str, Any]) -> str:
    """Markdown."""
    where = f"{found['gpu'] or found['cpu']}, {found['threads']} threads, {found['dtype']}"
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items() if number)
    lines = [f"{where}; {versions}"]
    for name, part in found["parts"].items():
        lines += ["", f"**{name}**: {part['about']}", ""]
        lines += ["| | | median | quartiles | times loralab |", "|---|---|---:|---:|---:|"]
        lines += [_line(row) for row in part["rows"]]
        if part["status"] != "completed":
            lines += ["", f"{part['status']}: {part['error']}" if part.get("error") else part["status"]]
    return "\n".join(lines)


def _line(row: Row) -> str:
    if row["median"] is None:
        return f"| {row['what']} | {row['name']} | {'failed: see the JSON' if 'error' in row else 'not measured'} | | |"
    low, high = row["quartiles"]
    unit, ratio = row["unit"], row["ratio"]
    times = f"{ratio:.2f}" if ratio else ""
    return f"| {row['what']} | {row['name']} | {row['median']:.4g} {unit} | {low:.4g} to {high:.4g} {unit} | {times} |"

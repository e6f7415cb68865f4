"""How time is taken, in turn and with the device idle; and the rows of measurements, as JSON and as Markdown tables."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from loralab.bench.launches import Launches
from loralab.bench.processes import Row

T = TypeVar("T")
OURS = "loralab"
WARM_UP = 3  # steps at the head of a measurement that are not counted


class Clock:
    """When each step ended, everything queued on the device included, for which the host does not wait: it may be a
    step ahead, as it is where nobody looks. ``apart``: it waits, and each step begins on a device at rest. The last
    ``profiled`` of ``steps`` steps are not timed, but what they launch is counted: ``launches``, None where none is
    profiled."""

    def __init__(self, device: str, steps: int = 0, profiled: int = 0, apart: bool = False) -> None:
        self.cuda, self.apart = device == "cuda", apart
        self._ends: list[Any] = []
        self.launches: Row | None = None
        self._timed, self._last, self._count = steps - profiled, steps, 0
        self._profile: Launches | None = None

    def __call__(self) -> None:
        self._count += 1
        if self._profile is None:
            self._ends.append(self._mark())
            if self.apart:
                self._wait()
        elif self._count == self._last:
            self._wait()
            self.launches = self._profile.stop(self._last - self._timed)
        if self._count == self._timed < self._last:
            self._wait()
            self._profile = Launches(self.cuda)

    def steps(self) -> list[float]:
        """Seconds of each step but the first, which has no beginning."""
        self._wait()
        pairs = zip(self._ends, self._ends[1:], strict=False)
        return [before.elapsed_time(after) / 1000 if self.cuda else after - before for before, after in pairs]

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        import torch

        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _wait(self) -> None:
        if self.cuda:
            import torch

            torch.cuda.synchronize()


def interleaved(items: Iterable[T], rounds: int) -> Iterator[tuple[int, T]]:
    """(round, item); every second round is in reverse, so that none always comes after the same neighbour."""
    forward = list(items)
    for number in range(rounds):
        yield from ((number, item) for item in (forward[::-1] if number % 2 else forward))


def summary(values: Sequence[float]) -> Row:
    """{median, quartiles, measurements}; of one value the quartiles are that value."""
    several = list(values) * 2 if len(values) == 1 else values
    low, middle, high = statistics.quantiles(several, n=4, method="inclusive")
    return {"median": middle, "quartiles": [low, high], "measurements": len(values)}


def counted(worker_result: Row) -> Any:
    """Seconds of a worker's steps after those that warm up."""
    return worker_result["steps"][WARM_UP - 1 :]


class Table:
    """The rows of one part. A row is a library at a task (``what``); its ratio is to loralab at the same task."""

    def __init__(self, save: Callable[[], None]) -> None:
        self.rows: list[Row] = []
        self._save = save
        self._values: dict[tuple[str, str], list[float]] = {}

    def row(self, name: str, what: str, unit: str, **about: Any) -> Row:
        """The row of that name and task, added at first use."""
        for row in self.rows:
            if (row["name"], row["what"]) == (name, what):
                return row
        row = {"name": name, "what": what, "unit": unit, "median": None, "quartiles": None, "ratio": None}
        self.rows.append({**row, "measurements": 0, **about})
        return self.rows[-1]

    def add(self, row: Row, values: Iterable[float], **about: Any) -> None:
        """Further measurements of a row, and what else is known of it."""
        measured = self._values.setdefault((row["name"], row["what"]), [])
        measured += values
        row.update(about, **summary(measured))
        same_task = [other for other in self.rows if other["what"] == row["what"]]
        ours = next((other["median"] for other in same_task if other["name"] == OURS), None)
        for other in same_task:
            other["ratio"] = other["median"] / ours if ours and other["median"] else None
        self._save()

    def fail(self, row: Row, error: Exception) -> None:
        """The row says why it was not measured."""
        row["error"] = str(error)
        self._save()


def render(result: Mapping[str, Any]) -> str:
    """Markdown."""
    where = f"{result['gpu'] or result['cpu']}, {result['threads']} threads, {result['dtype']}"
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items() if number)
    lines = [f"{where}; {versions}"]
    for name, part in result["parts"].items():
        lines += ["", f"**{name}**: {part['about']}", ""]
        lines += ["| | | median | quartiles | times loralab |", "|---|---|---:|---:|---:|"]
        lines += [_line(row) for row in part["rows"]]
        if part["status"] != "completed":
            lines += ["", f"{part['status']}: {part['error']}" if part.get("error") else part["status"]]
    return "\n".join(lines)


def _line(row: Row) -> str:
    if row["median"] is None:
        return f"| {row['what']} | {row['name']} | {'failed: see the JSON' if 'error' in row else 'not measured'} | | |"
    (low, high), unit = row["quartiles"], row["unit"]
    times = f"{row['ratio']:.2f}" if row["ratio"] else ""
    return f"| {row['what']} | {row['name']} | {row['median']:.4g} {unit} | {low:.4g} to {high:.4g} {unit} | {times} |"

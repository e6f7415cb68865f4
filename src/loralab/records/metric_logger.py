"""The interface of what metrics are written to: metrics.jsonl, Weights & Biases, or a logger of the user's."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Labels:
    """What a run is called, and what it is filtered and grouped by."""

    name: str
    group: str | None = None
    job_type: str = "train"
    tags: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)


class MetricLogger(Protocol):
    """Takes the rows of one trial."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """A row; steps count from 1 and never go back."""

    def sync(self) -> None:
        """Returns when what was logged is on disk."""

    def summarize(self, values: Mapping[str, Any]) -> None:
        """The trial's final scores and status."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table beside the rows."""

    def finish(self, exit_code: int) -> None:
        """Closes the logger."""


class LoggerSpec(Protocol):
    """The settings of a logger, as the group ``logger`` names them."""

    def start(
        self, folder: Path, labels: Labels, resumed: bool = False, left_out: Collection[str] = ()
    ) -> MetricLogger:
        """The logger of one trial. ``folder``: of the run; ``resumed``: rows of an earlier process may have been sent;
        ``left_out``: keys of rows that say nothing on this device. Raises nothing: a logger that cannot start is one
        that does nothing."""


def prepare(spec: LoggerSpec) -> None:
    """Has a logger that takes long to start begin beside the loading of the base: one that has ``prepare()``."""
    if (begin := getattr(spec, "prepare", None)) is not None:
        begin()

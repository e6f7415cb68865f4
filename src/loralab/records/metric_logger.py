"""The interface of what metrics are written to: metrics.jsonl, Weights & Biases, or a logger of the user's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


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

    def start(self, folder: Path, name: str, group: str | None, config: Mapping[str, Any]) -> MetricLogger:
        """The logger of one trial. ``folder``: of the run; ``group``: the sweep's name. Raises nothing: a logger that
        cannot start is one that does nothing."""

"""The interface of what metrics are written to: metrics.jsonl, Weights & Biases, or a logger of the user's."""

from collections.abc import Mapping, Sequence
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

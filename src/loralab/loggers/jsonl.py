"""metrics.jsonl: one object a row, flushed as it is written, so that a killed run keeps every finished step."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loralab.errors import DiskError


class MetricsFile:
    """Appends rows ``{"step": 12, "train/loss": 2.31, ...}``; a number that is not finite becomes null."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", buffering=1, encoding="utf-8")
        except OSError as error:
            raise DiskError(f"{path} cannot be written: {error.strerror or error}") from error

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        row = {"step": step, **{key: _plain(value) for key, value in values.items()}}
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
        except OSError as error:
            raise DiskError(f"{self.path} cannot be written: {error.strerror or error}") from error

    def close(self) -> None:
        self._file.close()


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value

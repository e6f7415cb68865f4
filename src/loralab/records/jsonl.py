"""metrics.jsonl: one object a row, flushed as it is written, so that a killed run keeps every finished step."""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loralab.errors import unwritable

log = logging.getLogger(__name__)


class MetricsFile:
    """Appends rows ``{"step": 12, "train/loss": 2.31, ...}``; a number that is not finite becomes null.

    ``step``: from which a run is continued. Rows of later steps are removed, and those of ``step`` with a name that
    begins with one of ``again``: the run will write them again.
    """

    def __init__(self, path: Path, step: int = 0, again: tuple[str, ...] = ("val/", "test/")) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if step:
                partial = path.with_name(f".{path.name}.kept")
                with partial.open("w", encoding="utf-8") as file:
                    file.write(_rows_until(path, step, again))
                    file.flush()
                    os.fsync(file.fileno())  # else a power cut may leave an empty file under the name
                partial.replace(path)
            self._file = path.open("a+" if step else "w+", buffering=1, encoding="utf-8")
        except OSError as error:
            raise unwritable(path, error) from error

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        row = {"step": step, **{key: _plain(value) for key, value in values.items()}}
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
        except OSError as error:
            raise unwritable(self.path, error) from error

    def sync(self) -> None:
        """Returns when every row is on the disk; a file that somebody has removed meanwhile is written again."""
        try:
            self._restore()
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise unwritable(self.path, error) from error

    def _restore(self) -> None:
        """Writes the rows again where the file has lost its name, though it is still open here."""
        if os.fstat(self._file.fileno()).st_nlink:
            return
        log.warning("%s was removed while the run wrote it: its rows are written again", self.path)
        self._file.seek(0)
        kept = self._file.read()
        self._file.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+", buffering=1, encoding="utf-8")
        self._file.write(kept)

    def summarize(self, values: Mapping[str, Any]) -> None:
        """Nothing: the record holds them."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Nothing: the record holds it."""

    def finish(self, exit_code: int) -> None:
        try:
            self._restore()
            self._file.close()
        except OSError as error:
            raise unwritable(self.path, error) from error


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(step, values) of each complete row, in order; none where there is no file."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
                yield int(row.pop("step")), row
            except (ValueError, KeyError, TypeError, AttributeError):  # cut short when the run was killed
                continue


def _rows_until(path: Path, step: int, again: tuple[str, ...]) -> str:
    """The complete rows of steps up to ``step``, without what is made ``again`` of ``step`` itself."""
    lines = path.read_text("utf-8", errors="replace").splitlines(keepends=True) if path.is_file() else []
    return "".join(line for line in lines if _is_finished(line, step, again))


def _is_finished(line: str, step: int, again: tuple[str, ...]) -> bool:
    try:
        row = json.loads(line)
        row_step = int(row["step"])
    except (ValueError, KeyError, TypeError):
        return False  # cut short when the run was killed
    return row_step < step or (row_step == step and not any(key.startswith(again) for key in row))


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value

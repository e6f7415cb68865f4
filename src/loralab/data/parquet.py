"""Rows of a .parquet file, through pyarrow."""

from collections.abc import Iterator
from pathlib import Path

from loralab.data.fields import missing
from loralab.data.rows import Record
from loralab.errors import ConfigError, DataError

AT_ONCE = 1024  # rows that are Python objects at a time


def parquet_records(path: Path, columns: list[str]) -> Iterator[Record]:
    """One record a row, of all its columns; its place is the row's number from 1. Raises ConfigError without pyarrow,
    DataError for a file that is none, or lacks one of ``columns``."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ConfigError(
            f"{path}: .parquet is read by pyarrow, which is not installed; valid: pip install 'loralab[hub]', or the "
            "rows as .jsonl"
        ) from None
    number = 0
    try:
        with ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names, columns)
            for batch in file.iter_batches(AT_ONCE):
                for fields in batch.to_pylist():
                    number += 1
                    yield Record(fields, f"{path}:{number}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as parquet behind row {number} ({error})") from None


def _check_columns(path: Path, held: list[str], columns: list[str]) -> None:
    for name in columns:
        if name not in held:
            raise DataError(f"{path}: {missing('column', name, held)}")

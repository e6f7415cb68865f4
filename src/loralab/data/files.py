"""A user's own files: .jsonl and .csv with templates, .txt for language modelling, each also as .gz."""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab import fingerprints
from loralab.data.base import SPLITS, Row, Splits, make_splits
from loralab.data.rows import VALIDATION_SHARE, Record, RowSpec
from loralab.errors import ConfigError, DataError

FORMATS = (".jsonl", ".csv", ".txt")
LISTED = 12  # files named in a message


@dataclass(frozen=True)
class Files(RowSpec):
    """Paths are relative to the folder the command was started in."""

    train: str | None = None
    validation: str | None = None  # null: one training row in ten, chosen by hash (of a text: its last tenth)
    test: str | None = None

    def source(self) -> str | None:
        paths = [Path(value).expanduser() for split in SPLITS if (value := getattr(self, split))]
        return fingerprints.of_files(paths)

    def splits(self) -> Splits:
        if not self.train:
            raise ConfigError("data.train is missing: the path of a .jsonl, .csv or .txt file (or .gz of one)")
        paths = {split: Path(value).expanduser() for split in SPLITS if (value := getattr(self, split))}
        formats = {split: file_format(path, f"data.{split}") for split, path in paths.items()}
        name = paths["train"].name
        if ".txt" not in formats.values():
            records = {split: READERS[formats[split]](path, self.columns) for split, path in paths.items()}
            return self.assemble(name, records)
        if set(formats.values()) != {".txt"}:
            raise ConfigError(
                f"data: .txt is plain text and cannot be mixed with other formats: {sorted(formats.values())}"
            )
        if self.text is not None or self.target is not None:
            raise ConfigError("data: a .txt file is plain text; templates (prompt, target, text) need .jsonl or .csv")
        return self.plain_text(name, paths)

    def plain_text(self, name: str, paths: dict[str, Path]) -> Splits:
        """One document a file; its rows, for ``limit``, are its lines."""
        lines = {split: text_lines(path) for split, path in paths.items()}
        if "validation" not in lines:
            whole = lines["train"]
            if len(whole) < 2:
                raise DataError(f"{paths['train']}: one line cannot be split; give data.validation")
            held_out = max(1, len(whole) // VALIDATION_SHARE)
            lines["train"], lines["validation"] = whole[:-held_out], whole[-held_out:]
        documents = {
            split: [Row("", "".join(part[: self.limit]), where=str(paths.get(split, paths["train"])))]
            for split, part in lines.items()
        }
        return make_splits(name, documents, kind="text")


def file_format(path: Path, key: str) -> str:
    """The format by the name's ending; DataError where the file is missing or of another kind."""
    if path.is_dir():
        raise DataError(f"{key}={str(path)!r} is a folder, a file is wanted; {_listing(path)}")
    if not path.is_file():
        raise DataError(f"{key}={str(path)!r}: there is no such file; {_listing(path.parent)}")
    name = path.name.lower().removesuffix(".gz")
    for ending in FORMATS:
        if name.endswith(ending):
            return ending
    raise DataError(f"{key}={str(path)!r}: this format is not read; valid: {', '.join(FORMATS)}, and .gz of them")


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return f"nor a folder {folder}"
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{folder} holds {', '.join(names[:LISTED]) or 'nothing'}{more}"


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, bytes with their line end); a byte order mark is dropped."""
    number = 0
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}:{number + 1}: the gzip file is damaged or cut short ({error})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def jsonl_records(path: Path, columns: list[str]) -> Iterator[Record]:
    """One object a line; empty lines are passed over."""
    for number, line in raw_lines(path):
        if line.strip():
            fields, problem = _json_object(line)
            yield Record(fields, f"{path}:{number}", problem)


def _json_object(line: bytes) -> tuple[dict[str, Any], str]:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return {}, f"not UTF-8 (byte {error.start + 1} of the line is 0x{line[error.start]:02x})"
    except RecursionError:
        return {}, "not JSON (nested too deeply)"
    except ValueError as error:
        return {}, f"not JSON ({error})"
    if not isinstance(value, dict):
        return {}, f"not a JSON object but {type(value).__name__}"
    return value, ""


def csv_records(path: Path, columns: list[str]) -> Iterator[Record]:
    """Comma-separated with a header, quoted as RFC 4180 has it."""
    # bytes that are not UTF-8 become lone surrogates, which the row's check names
    lines = (line.decode(errors="surrogateescape") for _, line in raw_lines(path))
    reader = csv.DictReader(lines, strict=True)
    try:
        header = list(reader.fieldnames or [])
        for name in columns:
            if name not in header:
                raise DataError(f"{path}:1: column {name!r} is missing (has: {', '.join(header) or 'nothing'})")
        for fields in reader:
            yield _csv_record(fields, header, f"{path}:{reader.line_num}")
    except csv.Error as error:
        raise DataError(f"{path}:{reader.reader.line_num}: not CSV ({error})") from None


def _csv_record(fields: dict[Any, Any], header: list[str], where: str) -> Record:
    extra = fields.pop(None, None)
    present = {name: value for name, value in fields.items() if value is not None}
    cells = len(present) + len(extra or [])
    problem = f"{cells} cells, the header has {len(header)}" if cells != len(header) else ""
    return Record(present, where, problem)


READERS: dict[str, Callable[[Path, list[str]], Iterator[Record]]] = {
    ".jsonl": jsonl_records,
    ".csv": csv_records,
}


def text_lines(path: Path) -> list[str]:
    """Lines with their ends; DataError for what is not text."""
    lines = []
    for number, line in raw_lines(path):
        if b"\0" in line:
            raise DataError(f"{path}:{number}: holds a NUL character; plain UTF-8 text is wanted")
        try:
            lines.append(line.decode())
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: not UTF-8 (byte {error.start + 1} of the line)") from None
    if not "".join(lines).strip():
        raise DataError(f"{path}: the file is empty ({len(lines)} lines read, no text)")
    return lines

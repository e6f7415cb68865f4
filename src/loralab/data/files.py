"""A user's own files: .jsonl, .csv (also .gz) and .parquet with templates, .txt (also .gz) for language modelling."""

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loralab.data.base import SPLITS, DataSpec, Row, Splits, make_splits
from loralab.data.fields import LONGEST, Number, missing
from loralab.data.parquet import parquet_records
from loralab.data.rows import VALIDATION_SHARE, Record, RowSpec
from loralab.errors import ConfigError, DataError
from loralab.records import fingerprints
from loralab.spec import spec

FORMATS = (".jsonl", ".csv", ".txt", ".parquet")
LISTED = 12  # files named in a message
LARGEST_CELL = 2**31 - 1  # characters; csv's own limit of 131,072 is shorter than many a document
UNCLOSED = "unexpected end of data"  # csv's word for a quote that is
UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def split_paths(spec: DataSpec) -> dict[str, Path]:
    """{split: its file} of those that ``train``, ``validation`` and ``test`` name."""
    return {split: Path(value).expanduser() for split in SPLITS if (value := getattr(spec, split))}


@spec("data")
class Files(RowSpec):
    """Paths are relative to the folder the command was started in."""

    train: str | None = None
    validation: str | None = None  # null: one training row in ten, chosen by hash (of a text: its last tenth)
    test: str | None = None

    def source(self) -> str | None:
        return fingerprints.of_files(list(split_paths(self).values()))

    def splits(self) -> Splits:
        if not self.train:
            raise ConfigError(
                "data.train is missing: the path of a .jsonl, .csv or .txt file (or .gz of one), or .parquet"
            )
        paths = split_paths(self)
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
            raise ConfigError(
                "data: a .txt file is plain text; templates (prompt, target, text) need .jsonl, .csv or .parquet"
            )
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
    name = path.name.lower()
    for ending in FORMATS:
        if name.endswith(ending) or (ending != ".parquet" and name.endswith(f"{ending}.gz")):
            return ending
    raise DataError(
        f"{key}={str(path)!r}: this format is not read; valid: {', '.join(FORMATS)}, and .gz of the first three"
    )


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return f"nor a folder {folder}"
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{folder} holds {', '.join(names[:LISTED]) or 'nothing'}{more}"


def raw_lines(path: Path) -> Iterator[tuple[int, str]]:
    r"""(line number from 1, text with its line end: \n, \r\n or \r); a byte order mark is dropped.

    Bytes that are not UTF-8 become lone surrogates, which the row's check names.
    """
    number = 0
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            if file.peek(2)[:2] in UTF_16:  # type: ignore[union-attr]
                raise DataError(f"{path}:1: the text is UTF-16; valid: UTF-8 (iconv -f UTF-16 -t UTF-8 makes it so)")
            text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")  # type: ignore[arg-type]
            for number, line in enumerate(text, 1):
                yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}:{number + 1}: the gzip file is damaged or cut short ({error})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _not_utf_8(line: str) -> str:
    """What is wrong with the bytes that ``line`` was read from; empty: nothing."""
    read = line.encode(errors="surrogateescape")
    try:
        read.decode()
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start + 1} of the line is 0x{read[error.start]:02x})"
    return ""


def jsonl_records(path: Path, columns: list[str]) -> Iterator[Record]:
    """One object a line; empty lines are passed over."""
    for number, line in raw_lines(path):
        if line.strip():
            fields, problem = _json_object(line)
            yield Record(fields, f"{path}:{number}", problem)


def _json_object(line: str) -> tuple[dict[str, Any], str]:
    if problem := _not_utf_8(line):
        return {}, problem
    try:
        value = json.loads(line, parse_float=Number, parse_int=Number)
    except RecursionError:
        return {}, "not JSON (nested too deeply)"
    except ValueError as error:
        return {}, f"not JSON ({error})"
    if not isinstance(value, dict):
        return {}, f"not a JSON object but {type(value).__name__}"
    return value, ""


def csv_records(path: Path, columns: list[str]) -> Iterator[Record]:
    """Comma-separated with a header, quoted as RFC 4180 has it; a row's place is the line it begins in."""
    csv.field_size_limit(LARGEST_CELL)
    reader = csv.reader((line for _, line in raw_lines(path)), strict=True)
    rows = _csv_rows(reader)
    first, header, problem = next(rows, (1, [], ""))
    if problem:
        raise DataError(f"{path}:{first}: the header is not CSV ({problem})")
    _check_header(f"{path}:{first}", header, columns)
    for start, cells, problem in rows:
        if problem == UNCLOSED and reader.line_num > start:
            raise DataError(
                f"{path}:{start}: a quote that opens in this row is never closed, so that all {reader.line_num} lines"
                " to the end of the file would be one cell; valid: a quote before and after the cell, doubled inside it"
            )
        yield _csv_record(cells, header, f"{path}:{start}", problem and f"not CSV ({problem})")


def _csv_rows(reader: Any) -> Iterator[tuple[int, list[str], str]]:
    """(line in which the row begins, its cells, why csv refuses it); empty lines are passed over."""
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lines = f" in lines {start} to {reader.line_num}" if reader.line_num > start else ""
            yield start, [], f"{error}{lines}" if str(error) != UNCLOSED else UNCLOSED
            continue
        if cells:
            yield start, cells, ""


def _check_header(where: str, header: list[str], columns: list[str]) -> None:
    twice = [name for name, count in Counter(header).items() if count > 1 and name]
    if twice:
        places = [str(index) for index, name in enumerate(header, 1) if name == twice[0]]
        raise DataError(f"{where}: the header names column {twice[0][:LONGEST]!r} twice (cells {' and '.join(places)})")
    for name in columns:
        if name not in header:
            apart = next((mark for mark in ";\t|" if len(header) == 1 and mark in header[0]), "")
            hint = f"; the cells seem to be separated by {apart!r}, a comma is wanted" if apart else ""
            raise DataError(f"{where}: {missing('column', name, header)}{hint}")


def _csv_record(cells: list[str], header: list[str], where: str, problem: str) -> Record:
    if not problem and len(cells) != len(header):
        problem = f"{len(cells)} cells, the header has {len(header)}"
    return Record(dict(zip(header, cells, strict=False)), where, problem)


READERS: dict[str, Callable[[Path, list[str]], Iterator[Record]]] = {
    ".jsonl": jsonl_records,
    ".csv": csv_records,
    ".parquet": parquet_records,
}


def text_lines(path: Path) -> list[str]:
    """Lines with their ends; DataError for what is not text."""
    lines = []
    for number, line in raw_lines(path):
        if "\0" in line:
            raise DataError(f"{path}:{number}: holds a NUL character; plain UTF-8 text is wanted")
        if problem := _not_utf_8(line):
            raise DataError(f"{path}:{number}: {problem}")
        lines.append(line)
    if not "".join(lines).strip():
        raise DataError(f"{path}: the file is empty ({len(lines)} lines read, no text)")
    return lines

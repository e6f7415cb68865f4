"""From a record (a JSON object, a CSV line) to a row: templates, labels, and what is wrong with a bad one."""

import logging
import math
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loralab.data.base import DataSpec, Row, Splits, hash_order, make_splits
from loralab.errors import ConfigError, DataError, nearest

log = logging.getLogger(__name__)

ON_BAD_ROW = ("error", "skip")
SHOWN = 5  # bad rows in a message
VALIDATION_SHARE = 10  # one row in so many, where no validation file is given


class BadRow(Exception):  # noqa: N818 - never leaves this package
    """Why one record cannot be a row."""


@dataclass(frozen=True, slots=True)
class Record:
    """What was read, and where; ``problem`` where it could not be read."""

    fields: Mapping[str, Any]
    where: str
    problem: str = ""


class Template:
    r"""``'{mr}\n'``: fields in braces; ``{{`` is a brace; backslash n a newline, backslash t a tab."""

    def __init__(self, text: str, key: str) -> None:
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ConfigError(
                f"data.{key}={text!r} is no template ({error}); a literal brace is written twice"
            ) from None
        self.parts: list[tuple[str, str | None]] = []
        for literal, name, spec, conversion in parts:
            if name is not None and (not name or spec or conversion or set(".[]") & set(name)):
                raise ConfigError(
                    f"data.{key}={text!r}: a field is a plain name in braces such as {{text}}; "
                    "no nested access, no format; a literal brace is written twice"
                )
            self.parts.append((literal.replace("\\n", "\n").replace("\\t", "\t"), name))

    @property
    def fields(self) -> list[str]:
        return [name for _, name in self.parts if name is not None]

    def filled_from(self, text: str, key: str, columns: Sequence[str]) -> "Template":
        """Itself, or where it has no field: the column of that name. ConfigError where there is none."""
        if self.fields or not self.parts:
            return self
        if text not in columns:
            raise ConfigError(
                f"data.{key}={text!r} has no {{field}}, so every row would be the same, and there is no column of "
                f"that name; {nearest(text, columns)}"
            )
        self.parts = [("", text)]
        return self

    def render(self, fields: Mapping[str, Any]) -> str:
        """The text, or BadRow."""
        return "".join(literal + (text_of(fields, name) if name is not None else "") for literal, name in self.parts)


@dataclass(frozen=True)
class RowSpec(DataSpec):
    """Data sets made of records: ``prompt`` and ``target``, or ``text`` and ``label``, or ``text`` alone."""

    prompt: str | None = None  # template such as '{mr}\n', or the name of a column
    target: str | None = None
    text: str | None = None
    label: str | None = None  # column name
    labels: list[str] = field(default_factory=list)  # ordered names; empty: those of the training rows, sorted
    on_bad_row: str = "error"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label is not None and (braces := re.fullmatch(r"\{([^{}]+)\}", self.label)):
            object.__setattr__(self, "label", braces[1])
        if self.on_bad_row not in ON_BAD_ROW:
            raise ConfigError(f"data.on_bad_row={self.on_bad_row!r} is unknown; {nearest(self.on_bad_row, ON_BAD_ROW)}")
        if self.text is not None and (self.prompt is not None or self.target is not None):
            raise ConfigError("data.text and data.prompt/data.target exclude each other: give one form")
        if self.target == "" or self.text == "":
            raise ConfigError("data.target and data.text cannot be empty: there would be nothing to learn")
        if self.prompt is not None and self.target is None:
            raise ConfigError("data.target is missing beside data.prompt: what should be learnt?")
        if self.label is not None and self.text is None:
            raise ConfigError(f"data.label={self.label!r} needs data.text, the template of what is to be classified")
        if self.labels and self.label is None:
            raise ConfigError("data.labels names classes, but data.label, the column that holds them, is missing")
        if len(set(self.labels)) < len(self.labels):
            raise ConfigError(f"data.labels names a class twice: {self.labels}")
        self.templates()  # each is parsed

    def templates(self) -> dict[str, Template]:
        """{key: template} of those that are set. Raises ConfigError."""
        given = {key: getattr(self, key) for key in ("prompt", "target", "text")}
        return {key: Template(text, key) for key, text in given.items() if text is not None}

    @property
    def kind(self) -> str:
        if self.target is not None:
            return "pairs"
        return "labels" if self.label is not None else "text"

    @property
    def columns(self) -> list[str]:
        """The fields a record must have."""
        names = [name for template in self.templates().values() for name in template.fields]
        return list(dict.fromkeys([*names, *([self.label] if self.label else [])]))

    def assemble(self, name: str, records: Mapping[str, Iterable[Record]], labels: Iterable[str] = ()) -> Splits:
        """Rows by split; the labels are the spec's, else ``labels``, else those of the training rows."""
        if self.text is None and self.target is None:
            raise ConfigError("data: give data.prompt and data.target (templates), or data.text and data.label")
        reader = Reader(self, list(self.labels or labels))
        rows = {split: reader.rows(split, part) for split, part in records.items()}
        refuse_identical(name, rows["train"], self.kind)
        if "validation" not in rows:
            rows["train"], rows["validation"] = split_off(rows["train"])
        splits = make_splits(name, rows, kind=self.kind, limit=self.limit, labels=reader.labels, skipped=reader.skipped)
        warn_of_overlap(splits)
        if self.kind == "labels" and len(classes := {row.target for row in splits.train}) == 1:
            log.warning("%s: every training row has the label %r: there is nothing to tell apart", name, *classes)
        return splits


class Reader:
    """Turns records into rows, split by split (train first: it may name the labels)."""

    def __init__(self, spec: RowSpec, labels: list[str]) -> None:
        self.spec, self.labels, self.templates = spec, labels, spec.templates()
        self.skipped = 0

    def rows(self, split: str, records: Iterable[Record]) -> list[Row]:
        """The good rows of a split; DataError for bad ones (on_bad_row=error) or none left."""
        records = list(records)
        if any(not record.problem for record in records):
            self.fill(records)
        if self.spec.label is not None and not self.labels:
            self.labels = infer_labels(records, self.spec.label)
        rows: list[Row] = []
        problems: list[str] = []
        for record in records:
            try:
                rows.append(self.row(record))
            except BadRow as problem:
                problems.append(f"{record.where}: {problem}")
        self.judge(split, len(records), problems)
        return rows

    def fill(self, records: Sequence[Record]) -> None:
        """A template that is the bare name of a column becomes that column."""
        if all(template.fields for template in self.templates.values()):
            return
        columns = list(dict.fromkeys(str(name) for record in records for name in record.fields))
        for key, template in self.templates.items():
            template.filled_from(getattr(self.spec, key), key, columns)

    def judge(self, split: str, read: int, problems: list[str]) -> None:
        """Bad rows are an error, or a warning; a split without a good one is always an error."""
        shown = "\n  ".join(problems[:SHOWN])
        if problems and self.spec.on_bad_row == "error":
            raise DataError(
                f"{len(problems)} of {read} rows of the {split} split are bad "
                f"(data.on_bad_row=skip leaves such out):\n  {shown}"
            )
        if len(problems) == read:
            raise DataError(
                f"the {split} split is empty: {read} rows read, {len(problems)} dropped"
                + (f"\n  {shown}" if shown else "")
            )
        if problems:
            self.skipped += len(problems)
            log.warning("%s: %d of %d rows are bad and left out, such as %s", split, len(problems), read, problems[0])

    def row(self, record: Record) -> Row:
        """One row, or BadRow."""
        if record.problem:
            raise BadRow(record.problem)
        made = {key: template.render(record.fields) for key, template in self.templates.items()}
        for key, text in made.items():
            if not text.strip() and self.templates[key].parts:
                raise BadRow(f"{key} is empty (fields {', '.join(self.templates[key].fields)})")
        if self.spec.kind == "pairs":
            return Row(made.get("prompt", ""), made["target"], where=record.where)
        if self.spec.label is None:
            return Row("", made["text"], where=record.where)
        label = class_index(label_of(record.fields, self.spec.label), self.labels, self.spec.label)
        return Row(made["text"], self.labels[label], label, record.where)


def text_of(fields: Mapping[str, Any], name: str) -> str:
    """A field as text; numbers as they are written."""
    value = _field(fields, name)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRow(f"field {name!r} is {_typename(value)}, text is wanted")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow(f"field {name!r} is {value}, text or a finite number is wanted")
    text = str(value)
    if "\0" in text:
        raise BadRow(f"field {name!r} holds a NUL character")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise BadRow(f"field {name!r} is not valid UTF-8")
    return text


def label_of(fields: Mapping[str, Any], name: str) -> str | int:
    """The raw label: a class's name or number."""
    value = _field(fields, name)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRow(f"field {name!r} is {_typename(value)}; a label is a name or a whole number")
    if isinstance(value, str) and not value.strip():
        raise BadRow(f"field {name!r} is empty; a label is a name or a whole number")
    return value


def class_index(value: str | int, labels: list[str], column: str) -> int:
    """The index of a class named or numbered by ``value``."""
    if str(value) in labels:
        return labels.index(str(value))
    number = int(value) if str(value).isascii() and str(value).isdigit() and len(str(value)) < 10 else None
    if number is not None and number < len(labels):
        return number
    shown = ", ".join(labels[:20]) + (", ..." if len(labels) > 20 else "")
    raise BadRow(f"field {column!r} is {value!r}, not one of the {len(labels)} labels ({shown})")


def infer_labels(records: Iterable[Record], column: str) -> list[str]:
    """The labels that occur, numbers in the order of their value, else names sorted."""
    values = set()
    for record in records:
        try:
            values.add(str(label_of(record.fields, column)))
        except BadRow:
            continue  # reported with its row
    if all(value.isascii() and value.isdigit() for value in values):
        return sorted(values, key=lambda value: (int(value), value))
    return sorted(values)


def split_off(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """One row in ten for validation, by hash: rows with the same prompt (or target) stay on one side."""
    keys = [hash_order(row.prompt or row.target) for row in rows]
    bounds = sorted(set(keys))
    if len(bounds) < 2:
        raise DataError(
            f"data.validation is null and {len(rows)} training rows ({len(bounds)} different) "
            "cannot be split: give a validation file"
        )
    bound = bounds[max(1, len(bounds) // VALIDATION_SHARE) - 1]
    held_out = [row for row, key in zip(rows, keys, strict=True) if key <= bound]
    return [row for row, key in zip(rows, keys, strict=True) if key > bound], held_out


def refuse_identical(name: str, rows: Sequence[Row], kind: str) -> None:
    """DataError where all rows hold the same input, as after a template of the wrong column."""
    first = rows[0]
    if len(rows) < 2 or any(row.prompt != first.prompt for row in rows):
        return
    if kind == "labels" or all(row.target == first.target for row in rows):
        shown = (first.prompt or first.target)[:60]
        raise DataError(
            f"{name}: all {len(rows)} training rows hold the same input ({shown!r}), so nothing can be learnt; "
            f"look at {'data.prompt and data.target' if kind == 'pairs' else 'data.text'}"
        )
    if first.prompt:
        log.warning("%s: all %d training rows have the same prompt (%r)", name, len(rows), first.prompt[:60])


def warn_of_overlap(splits: Splits) -> None:
    """Counts the held-out rows that are also training rows."""
    known = {(row.prompt, row.target) for row in splits.train}
    for split in ("validation", "test"):
        count = sum((row.prompt, row.target) in known for row in splits[split])
        if count:
            log.warning("%d of %d %s rows are also training rows", count, len(splits[split]), split)


def _field(fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        close = nearest(name, map(str, fields)).partition("valid:")[0].strip()
        raise BadRow(
            f"field {name!r} is missing (has: {', '.join(map(str, fields)) or 'nothing'}){close and f'; {close}'}"
        )
    return fields[name]


def _typename(value: Any) -> str:
    names = {type(None): "null", bool: "true/false", list: "a list", dict: "an object", float: "a fraction"}
    return names.get(type(value), type(value).__name__)

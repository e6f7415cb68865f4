"""From a record (a JSON object, a CSV line) to a row: templates, labels, and what is wrong with a bad one."""

import copy
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Self

from annotated_types import Len
from pydantic import AfterValidator, Strict

from loralab.data.base import DataSpec, Row, Splits, hash_order, make_splits
from loralab.data.choices import choices_of, wrong_choices
from loralab.data.fields import BadRow, Template
from loralab.data.labels import Classes, key_of, label_of, score_of, warn_of_singles
from loralab.errors import ConfigError, DataError
from loralab.spec import Text, spec

log = logging.getLogger(__name__)

Plain = Annotated[str, Strict()]
KEYS = {"pair": "text[1]"}  # of templates whose name is not their key's
SHOWN = 5  # bad rows in a message
VALIDATION_SHARE = 10  # one row in so many, where no validation file is given


@dataclass(frozen=True, slots=True)
class Record:
    """What was read, and where; ``problem`` where it could not be read."""

    fields: Mapping[str, Any]
    where: str
    problem: str = ""


def _without_braces(name: str) -> str:
    """The column that a label written as a template, ``{label}``, means."""
    braces = re.fullmatch(r"\{([^{}]+)\}", name)
    return braces[1] if braces else name


@spec("data")
class RowSpec(DataSpec):
    """Data sets made of records: ``prompt`` and ``target``, or ``text`` and ``label``, or ``text`` alone."""

    scores: ClassVar[bool] = False  # whether labels are real-valued: as_scores() says so

    prompt: str | None = None  # template such as '{mr}\n', or the name of a column
    target: str | None = None
    text: Annotated[
        Plain | Annotated[list[Plain], Len(2, 2)] | None,  # a number is no template
        "a template such as '{review}', or two such as ['{premise}', '{hypothesis}']",
    ] = None
    label: Annotated[str, AfterValidator(_without_braces)] | None = None  # column name
    choices: Annotated[
        list[Text] | Plain | None, "a list of answers such as [A, B, C, D], or the name of a column of such lists"
    ] = None  # of pairs: the target is one of them, and the likeliest counts
    labels: list[Text] = field(default_factory=list)  # ordered names; empty: those of the training rows, sorted
    on_bad_row: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text is not None and (self.prompt is not None or self.target is not None):
            raise ConfigError("data.text and data.prompt/data.target exclude each other: give one form")
        if isinstance(self.text, list) and ("" in self.text or self.label is None):
            raise ConfigError(
                f"data.text={self.text!r}: a list is a pair of texts, classified by data.label; valid: two templates "
                "such as ['{premise}', '{hypothesis}'] and the name of a column in data.label"
            )
        if self.target == "" or self.text == "":
            raise ConfigError("data.target and data.text cannot be empty: there would be nothing to learn")
        if self.prompt is not None and self.target is None:
            raise ConfigError("data.target is missing beside data.prompt: what should be learnt?")
        if self.label is not None and self.text is None:
            raise ConfigError(f"data.label={self.label!r} needs data.text, the template of what is to be classified")
        if self.labels and self.label is None:
            raise ConfigError("data.labels names classes, but data.label, the column that holds them, is missing")
        if len({key_of(name) for name in self.labels}) < len(self.labels):
            raise ConfigError(f"data.labels names a class twice: {self.labels}")
        if self.choices is not None:
            self._check_choices()
        self.templates()  # each is parsed

    def _check_choices(self) -> None:
        if not self.prompt or self.target is None:
            raise ConfigError(f"data.choices={self.choices!r} needs data.prompt and data.target, the right one of them")
        if isinstance(self.choices, list) and (problem := wrong_choices(self.choices)):
            raise ConfigError(f"data.choices={self.choices!r} {problem}; valid: answers such as [A, B, C, D]")

    @property
    def template_texts(self) -> dict[str, str]:
        """{key: template as it is written} of those that are set."""
        texts = self.text if isinstance(self.text, list) else [self.text]
        by_key = {"prompt": self.prompt, "target": self.target, **dict(zip(("text", "pair"), texts, strict=False))}
        return {key: text for key, text in by_key.items() if text is not None}

    def templates(self) -> dict[str, Template]:
        """{key: template} of those that are set. Raises ConfigError."""
        return {key: Template(text, KEYS.get(key, key)) for key, text in self.template_texts.items()}

    def as_scores(self) -> Self:
        """A copy that reads the label as a real-valued score."""
        copied = copy.copy(self)
        object.__setattr__(copied, "scores", True)
        return copied

    @property
    def kind(self) -> str:
        if self.target is not None:
            return "pairs"
        if self.label is None:
            return "text"
        return "scores" if self.scores else "labels"

    @property
    def documents(self) -> bool:
        return self.kind == "text"

    @property
    def multiple_choice(self) -> bool:
        return self.choices is not None

    @property
    def columns(self) -> list[str]:
        """The fields a record must have."""
        names = [name for template in self.templates().values() for name in template.fields]
        others = [name for name in (self.label, self.choices) if isinstance(name, str) and name]
        return list(dict.fromkeys([*names, *others]))

    def assemble(self, name: str, records: Mapping[str, Iterable[Record]], labels: Iterable[str] = ()) -> Splits:
        """Rows by split; the labels are the spec's, else ``labels``, else those of the training rows."""
        if self.text is None and self.target is None:
            raise ConfigError("data: give data.prompt and data.target (templates), or data.text and data.label")
        reader = Reader(self, list(self.labels or labels))
        rows = {split: reader.rows(split, part) for split, part in records.items()}
        refuse_identical(name, rows["train"], self.kind)
        if "validation" not in rows:
            rows["train"], rows["validation"] = split_off(rows["train"])
        splits = make_splits(
            name, rows, kind=self.kind, limit=self.limit, labels=reader.classes.names, skipped=reader.skipped
        )
        warn_of_overlap(splits)
        if self.kind == "labels" and self.label:
            warn_of_singles(self.label, [row.target for row in splits.train])
        if self.kind == "labels" and len(classes := {row.target for row in splits.train}) == 1:
            log.warning("%s: every training row has the label %r: there is nothing to tell apart", name, *classes)
        return splits


class Reader:
    """Turns records into rows, split by split (train first: it may name the labels)."""

    def __init__(self, spec: RowSpec, labels: list[str]) -> None:
        self.spec, self.templates = spec, spec.templates()
        self.classes = Classes(spec.label or "", labels if spec.kind == "labels" else [])
        self.skipped = 0

    def rows(self, split: str, records: Iterable[Record]) -> list[Row]:
        """The good rows of a split; DataError for bad ones (on_bad_row=error) or none left."""
        records = list(records)
        if any(not record.problem for record in records):
            self.use_columns(records)
        if self.spec.kind == "labels" and not self.classes.names:
            self.classes.infer(record.fields for record in records)
        rows: list[Row] = []
        problems: list[str] = []
        for record in records:
            try:
                rows.append(self.row(record))
            except BadRow as problem:
                problems.append(f"{record.where}: {problem}")
        report_bad_rows(split, len(records), problems, self.spec.on_bad_row)
        self.skipped += len(problems)
        return rows

    def use_columns(self, records: Sequence[Record]) -> None:
        """Changes each template that is the bare name of a column into that column. Raises ConfigError."""
        if all(template.fields for template in self.templates.values()):
            return
        columns = list(dict.fromkeys(str(name) for record in records for name in record.fields))
        for key, template in self.templates.items():
            template.use_column(self.spec.template_texts[key], KEYS.get(key, key), columns)

    def row(self, record: Record) -> Row:
        """The row of a record. Raises BadRow."""
        if record.problem:
            raise BadRow(record.problem)
        texts = {key: template.render(record.fields) for key, template in self.templates.items()}
        for key, text in texts.items():
            if not text.strip() and self.templates[key].parts:
                raise BadRow(f"{key} is empty (fields {', '.join(self.templates[key].fields)})")
        if self.spec.kind == "pairs":
            choices = choices_of(record.fields, self.spec.choices, texts["target"])
            return Row(texts.get("prompt", ""), texts["target"], where=record.where, choices=choices)
        if self.spec.label is None:
            return Row("", texts["text"], where=record.where)
        if self.spec.scores:
            score, text = score_of(record.fields, self.spec.label)
            return Row(texts["text"], text, score, record.where, texts.get("pair"))
        label = self.classes.index(label_of(record.fields, self.spec.label))
        return Row(texts["text"], self.classes.names[label], label, record.where, texts.get("pair"))


def report_bad_rows(split: str, read: int, problems: list[str], on_bad_row: str) -> None:
    """Raises DataError for bad rows (``on_bad_row=skip``: logs a warning), and for a split without one good row.
    ``read``: rows of the split; ``problems``: a message for each bad one."""
    shown = "\n  ".join(problems[:SHOWN])
    if problems and on_bad_row == "error":
        raise DataError(
            f"{len(problems)} of {read} rows of the {split} split are bad "
            f"(data.on_bad_row=skip leaves such out):\n  {shown}"
        )
    if len(problems) == read:
        raise DataError(
            f"the {split} split is empty: {read} rows read, {len(problems)} dropped" + (f"\n  {shown}" if shown else "")
        )
    if problems:
        log.warning("%s: %d of %d rows are bad and left out, such as %s", split, len(problems), read, problems[0])


def split_off(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """One row in ten for validation, by hash: rows with the same prompt (or target) stay on one side."""
    keys = [hash_order((row.prompt or row.target) + (row.pair or "")) for row in rows]
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
    if len(rows) < 2 or any((row.prompt, row.pair) != (first.prompt, first.pair) for row in rows):
        return
    if kind in ("labels", "scores") or all(row.target == first.target for row in rows):
        shown = (first.prompt or first.target)[:60]
        raise DataError(
            f"{name}: all {len(rows)} training rows hold the same input ({shown!r}), so nothing can be learnt; "
            f"look at {'data.prompt and data.target' if kind == 'pairs' else 'data.text'}"
        )
    if first.prompt:
        log.warning("%s: all %d training rows have the same prompt (%r)", name, len(rows), first.prompt[:60])


def warn_of_overlap(splits: Splits) -> None:
    """Logs, for validation and test, how many rows are also training rows."""
    known = {(row.prompt, row.pair, row.target) for row in splits.train}
    for split in ("validation", "test"):
        count = sum((row.prompt, row.pair, row.target) in known for row in splits[split])
        if count:
            log.warning("%d of %d %s rows are also training rows", count, len(splits[split]), split)

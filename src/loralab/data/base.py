"""Rows of text before any tokenizer has seen them, and the spec that every data set fills in."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from annotated_types import Le

from loralab.data.decoding import check_generation
from loralab.errors import ConfigError
from loralab.records import fingerprints
from loralab.spec import Count, Natural, spec

KINDS = ("pairs", "text", "labels", "scores", "chat")
SPLITS = ("train", "validation", "test")
FORGETTING = "forgetting"  # the name of the scores on ``data.forgetting``, and of its rows among those of a trial


@dataclass(frozen=True, slots=True)
class Row:
    """One example: a prompt and its continuation, a text (or two) and its label, or a document.

    All of it is plain text: a special token is one only where a template wrote it (``fields.TemplateText``).
    """

    prompt: str  # pairs: the source text; labels, scores: the text; text: ""; chat: the messages in JSON
    # pairs: the continuation; labels: the label's name; scores: as written; text: the document; chat: the assistant's
    target: str = ""
    label: int | float | None = None
    where: str = ""  # file:line, for messages
    pair: str | None = None  # labels, scores: the second text of a pair
    choices: tuple[str, ...] = ()  # pairs: the target and the answers beside it


@dataclass(frozen=True)
class Splits:
    """The rows of one data set."""

    name: str
    train: list[Row]
    validation: list[Row]
    test: list[Row]
    labels: list[str]  # ordered class names; empty unless kind is labels
    fingerprint: str  # 16 hex digits of the sha256 over all rows
    kind: str = "pairs"  # one of KINDS
    skipped: int = 0  # bad rows left out by on_bad_row=skip
    bytes: dict[str, int] = field(default_factory=dict)  # UTF-8 bytes of the targets, by split: for bits per byte

    def __getitem__(self, split: str) -> list[Row]:
        rows: list[Row] = getattr(self, split)
        return rows


@spec("data", kw_only=True)
class DataSpec:
    """What every data set is configured by. ``splits()`` reads it; nothing is read before.

    One that is drawn from the base itself says ``from_base`` and has ``sample`` in place of ``splits``.
    """

    from_base: ClassVar[bool] = False

    batch_size: Annotated[Count, Le(2**20)] = 8  # no machine holds more
    limit: Count | None = None  # the first N rows of each split
    packing: bool = False  # several training rows in a sequence of model.max_length, which batch_size counts then
    generate_rows: Natural = 0  # rows of the held-out split that are also scored by generation
    generation: dict[str, Any] = field(default_factory=dict)  # of transformers' GenerationConfig; empty: greedy
    rouge: Literal["unicode", "published"] = "unicode"  # words that ROUGE counts: of every script, or a-z and 0-9
    bleu: Literal["13a", "intl", "zh", "char", "none"] = "13a"  # sacrebleu's tokenizer, by which BLEU counts words
    forgetting: Any = None  # a DataSpec whose validation split every run is scored on at its end; None: there is none

    def __post_init__(self) -> None:
        if self.forgetting is not None:
            self._check_forgetting()
        if self.generation:
            check_generation(self.generation)

    def _check_forgetting(self) -> None:
        other = self.forgetting
        if not isinstance(other, DataSpec):
            raise ConfigError(f"data.forgetting={other!r} is no data set; valid: a DataSpec, or null")
        for name, usual in (("forgetting", None), ("generate_rows", 0), ("packing", False)):
            if (value := getattr(other, name)) != usual:
                valid = "null" if usual is None else str(usual).lower()
                raise ConfigError(
                    f"data.forgetting.{name}={str(value)[:40]}: they are scored by their loss alone; valid: {valid}"
                )

    @property
    def reads_base(self) -> bool:
        """Whether some of the rows are drawn from the base."""
        return self.from_base or (self.forgetting is not None and self.forgetting.from_base)

    @property
    def documents(self) -> bool:
        """Whether the rows are plain text, as far as the settings tell."""
        return False

    @property
    def multiple_choice(self) -> bool:
        """Whether each row has choices."""
        return False

    def splits(self) -> Splits:
        """Read the rows. Raises DataError with file and line."""
        raise NotImplementedError

    def as_scores(self) -> Self:
        """The spec whose labels are read as real-valued scores, for regression; here itself."""
        return self

    def source(self) -> str | None:
        """16 hex digits of what the rows are read from, here the files that the fields name: equal where they are the
        same. None where there are no files, or not on this machine. Reads no row."""
        named = [value for field_ in fields(self) if isinstance(value := getattr(self, field_.name), str)]
        return fingerprints.of_files(path for value in named if (path := Path(value).expanduser()).is_file())

    def sample(self, model: Any, tokenizer: Any, task: str, max_length: int) -> Any:
        """The encoded rows drawn from the unquantized base, where ``from_base``."""
        raise NotImplementedError


def make_splits(
    name: str,
    rows: dict[str, list[Row]],
    *,
    kind: str = "pairs",
    limit: int | None = None,
    labels: Iterable[str] = (),
    skipped: int = 0,
) -> Splits:
    """The splits, each cut to its first ``limit`` rows, with their fingerprint and the UTF-8 bytes of their targets."""
    cut = {split: rows.get(split, [])[:limit] for split in SPLITS}
    return Splits(
        name=name,
        **cut,
        labels=list(labels),
        fingerprint=fingerprint(cut),
        kind=kind,
        skipped=skipped,
        bytes={split: sum(len(row.target.encode()) for row in cut[split]) for split in SPLITS},
    )


def fingerprint(rows: dict[str, list[Row]]) -> str:
    """16 hex digits: the same rows in the same order and splits, whatever file or machine they came from."""
    digest = hashlib.sha256()
    for split in SPLITS:
        digest.update(f"{split}\0{len(rows[split])}\0".encode())
        for row in rows[split]:
            digest.update(f"{row.prompt}\0{row.target}\0{row.label}\0".encode())
            if row.pair is not None:
                digest.update(f"pair\0{row.pair}\0".encode())
            if row.choices:
                digest.update("\0".join(["choices", *row.choices, ""]).encode())
    return digest.hexdigest()[:16]


def hash_order(text: str) -> bytes:
    """Sort key that shuffles once and for all, the same on every platform."""
    return hashlib.sha256(text.encode()).digest()

"""Rows of text before any tokenizer has seen them, and the spec that every data set fills in."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from annotated_types import Le

from loralab.errors import ConfigError, nearest
from loralab.records import fingerprints
from loralab.spec import Count, Natural, spec

KINDS = ("pairs", "text", "labels", "scores", "chat")
SPLITS = ("train", "validation", "test")
DECODING = (  # of transformers' GenerationConfig; what frames a text is training's
    *("bad_words_ids", "begin_suppress_tokens", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size"),
    *("encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty"),
    *("length_penalty", "max_new_tokens", "min_new_tokens", "min_p", "no_repeat_ngram_size", "num_beams"),
    *("remove_invalid_values", "renormalize_logits", "repetition_penalty", "sequence_bias", "suppress_tokens"),
    *("temperature", "top_k", "top_p", "typical_p"),
)
SAMPLING = ("epsilon_cutoff", "eta_cutoff", "min_p", "temperature", "top_k", "top_p", "typical_p")  # need do_sample


def _whole(least: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: type(value) is int and value >= least, f"a whole number from {least}"


def _real(holds: Callable[[float], bool], words: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: type(value) in (int, float) and holds(value), words


RANGES = {  # what transformers finds out while it writes, or takes without a word
    **dict.fromkeys(("max_new_tokens", "num_beams"), _whole(1)),
    **dict.fromkeys(("min_new_tokens", "no_repeat_ngram_size", "top_k"), _whole(0)),
    **dict.fromkeys(("repetition_penalty", "temperature"), _real(lambda value: value > 0, "a number above 0")),
    **dict.fromkeys(("top_p", "typical_p"), _real(lambda value: 0 < value <= 1, "a number above 0, at most 1")),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff"), _real(lambda value: 0 <= value < 1, "0 or a number below 1")),
    "min_p": _real(lambda value: 0 <= value <= 1, "a number from 0 to 1"),
}


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

    def __post_init__(self) -> None:
        if self.generation:
            check_generation(self.generation)

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


def check_generation(options: dict[str, Any], where: str = "data.generation.") -> None:
    """Raises ConfigError for what transformers' GenerationConfig does not know, what is out of range, or that is not
    one text a row.

    ``where``: before the name of an option in the message.
    """
    from transformers import GenerationConfig

    if unknown := [key for key in options if key not in DECODING]:
        raise ConfigError(f"{where}{unknown[0]} is not an option of decoding; {nearest(unknown[0], DECODING)}")
    try:
        GenerationConfig(**options).validate()
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{where.rstrip('.') or 'decoding'}={options}: transformers refuses it: {' '.join(str(error).split())}"
        ) from None
    for key, (allowed, words) in RANGES.items():
        if options.get(key) is not None and not allowed(options[key]):
            raise ConfigError(f"{where}{key}={options[key]} is out of range; valid: {words}")


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

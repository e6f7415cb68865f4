"""All splits of a data set in token ids, for one task."""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loralab.data.base import FORGETTING, SPLITS, Splits
from loralab.data.encoder import Encoder, special_affixes
from loralab.data.examples import IGNORE, Blocks, Example, statistics
from loralab.data.fields import template_spans
from loralab.data.turns import Turns
from loralab.errors import ConfigError, DataError

log = logging.getLogger(__name__)

__all__ = ["IGNORE", "Blocks", "Encoded", "Encoder", "Example", "encode", "special_affixes", "statistics"]

KINDS_BY_TASK = {
    "causal_lm": ("pairs", "text", "labels", "chat"),
    "seq2seq_lm": ("pairs", "labels"),
    "sequence_classification": ("labels", "scores"),
}
HOLDS = {"text": "plain text", "chat": "conversations"}


@dataclass(frozen=True)
class Encoded:
    """All splits in token ids. ``tokens[split]`` holds rows, tokens, target_tokens, longest.

    ``forgetting``: another data set that is only scored, by its validation split; None: there is none.
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    truncated: int  # rows cut to max_length, all splits
    tokens: dict[str, dict[str, int]]
    splits: Splits
    task: str = "causal_lm"
    forgetting: "Encoded | None" = None

    @cached_property
    def targets(self) -> str:
        """16 hex digits over the validation and test targets: token ids that a loss is taken over, or class ids.

        Scores of runs with equal targets are over the same tokens, whatever the prompts, batches and padding.
        """
        digest = hashlib.sha256()
        dtype = np.float64 if self.splits.kind == "scores" else np.int64
        for split in ("validation", "test"):
            for ids in self._scored(self[split]):
                digest.update(f"{split} {len(ids)} ".encode() + np.asarray(ids, dtype).tobytes())
        return digest.hexdigest()[:16]

    def document_bytes(self, split: str) -> int:
        """UTF-8 bytes of the documents of ``split``, of which every token is predicted; 0 for other rows."""
        if split == FORGETTING:
            return self.forgetting.document_bytes("validation") if self.forgetting else 0
        return self.splits.bytes.get(split, 0) if self.splits.kind == "text" else 0

    def _scored(self, examples: Sequence[Example]) -> Iterable[Sequence[int] | NDArray[np.int32]]:
        """What each row has to predict; a causal loss never predicts a row's first token."""
        if isinstance(examples, Blocks):
            return [examples.stream[1:]]
        first = 1 if self.task == "causal_lm" else 0
        return ([label for label in example.labels[first:] if label != IGNORE] for example in examples)

    def __getitem__(self, split: str) -> Sequence[Example]:
        if split == FORGETTING:
            return self.forgetting.validation if self.forgetting else ()
        examples: Sequence[Example] = getattr(self, split)
        return examples


def encode(splits: Splits, tokenizer: Any, task: str, max_length: int, typed: bool = False) -> Encoded:
    """Tokenize every split for ``task``; rows longer than ``max_length`` are cut, and counted.

    The prompt is cut from the left first, then the target from the right. ``typed``: the model reads token_type_ids.
    """
    valid = KINDS_BY_TASK[task]
    if splits.kind not in valid:
        need = {"sequence_classification": "data.text and data.label", "seq2seq_lm": "data.prompt and data.target"}
        raise ConfigError(
            f"model.task={task} needs {need[task]}, but data {splits.name} holds "
            f"{HOLDS.get(splits.kind, 'prompts and targets')}"
        )
    if splits.kind == "labels" and task == "causal_lm":
        log.warning(
            "data %s has labels, but model.task=causal_lm trains a language model to write the classes' names, and "
            "val/token_accuracy counts tokens, not rows; model.task=sequence_classification trains a classifier",
            splits.name,
        )
    encoder = Encoder(tokenizer, task, max_length, typed)
    _check_pairs(splits, tokenizer, task)
    form = Turns(tokenizer, max_length) if splits.kind == "chat" else encoder
    parts: dict[str, Sequence[Example]] = {}
    for split in SPLITS:
        rows = splits[split]
        parts[split] = encoder.blocks(rows) if splits.kind == "text" else form.examples(rows)
    encoder.log_notices()
    if splits.kind == "text":
        _warn_of_unknown(splits.name, [part for part in parts.values() if isinstance(part, Blocks)], tokenizer)
    for split in ("train", "validation"):
        if splits[split] and not len(parts[split]):
            raise DataError(f"data {splits.name}: the {split} split has not one token to predict")
    return Encoded(
        train=parts["train"],
        validation=parts["validation"],
        test=parts["test"],
        truncated=sum(_truncated(part) for part in parts.values()),
        tokens={split: statistics(part) for split, part in parts.items()},
        splits=splits,
        task=task,
    )


def _warn_of_unknown(name: str, parts: Sequence[Blocks], tokenizer: Any) -> None:
    """Says where tokens are fewer bits than the text, since they do not spell all of it."""
    unknown = tokenizer.unk_token_id
    if unknown in (None, tokenizer.eos_token_id):
        return
    if count := sum(int((part.stream == unknown).sum()) for part in parts):
        log.warning(
            "%d tokens of %s are %s, which stands for characters that the tokenizer does not know: bits_per_byte is "
            "less than the text needs",
            *(count, name, tokenizer.unk_token),
        )


def _check_pairs(splits: Splits, tokenizer: Any, task: str) -> None:
    first = splits.train[0] if splits.train else None
    if first is None or splits.kind not in ("labels", "scores"):
        return
    if first.pair is not None and task != "sequence_classification":
        raise ConfigError(f"data.text is a pair of texts, which model.task={task} cannot read; valid: one template")
    separator, spans = tokenizer.sep_token, template_spans(first.prompt)
    if separator and task == "sequence_classification" and any(separator in first.prompt[a:b] for a, b in spans):
        log.warning(
            "data.text writes the separator %r by hand, so the model is told of one text; data.text=['{a}', '{b}'] is "
            "a pair, framed as the tokenizer frames pairs",
            separator,
        )


def _truncated(examples: Sequence[Example]) -> int:
    return 0 if isinstance(examples, Blocks) else sum(example.truncated for example in examples)

"""Tokenization with the prompt masked: prompt and target are tokenized alone, so their boundary is exact."""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from loralab.data.base import SPLITS, Row, Splits
from loralab.errors import ConfigError, DataError

log = logging.getLogger(__name__)

IGNORE = -100  # the label that transformers' losses skip
DOCUMENTS_PER_CALL = 128  # a tokenizer call returns Python lists: bounds the memory of a large corpus

KINDS_BY_TASK = {
    "causal_lm": ("pairs", "text", "labels"),
    "seq2seq_lm": ("pairs", "labels"),
    "sequence_classification": ("labels",),
}


@dataclass(frozen=True, slots=True)
class Example:
    """One row in token ids.

    causal_lm: ``labels`` aligned with ``input_ids``, -100 on the prompt; seq2seq_lm: source and target;
    sequence_classification: ``labels`` is [class index]. ``target_tokens`` counts what enters the loss.
    """

    input_ids: list[int]
    labels: list[int]
    target_tokens: int
    truncated: bool = False


@dataclass(frozen=True)
class Encoded:
    """All splits in token ids. ``tokens[split]`` holds rows, tokens, target_tokens, longest."""

    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    truncated: int  # rows cut to max_length, all splits
    tokens: dict[str, dict[str, int]]
    splits: Splits
    task: str = "causal_lm"

    @cached_property
    def targets(self) -> str:
        """16 hex digits over the validation and test targets: token ids that a loss is taken over, or class ids.

        Scores of runs with equal targets are over the same tokens, whatever the prompts, batches and padding.
        """
        digest = hashlib.sha256()
        for split in ("validation", "test"):
            for ids in self._scored(self[split]):
                digest.update(f"{split} {len(ids)} ".encode() + np.asarray(ids, np.int64).tobytes())
        return digest.hexdigest()[:16]

    def _scored(self, examples: Sequence[Example]) -> Iterable[Sequence[int] | NDArray[np.int32]]:
        """What each row has to predict; a causal loss never predicts a row's first token."""
        if isinstance(examples, Blocks):
            return [examples.stream[1:]]
        first = 1 if self.task == "causal_lm" else 0
        return ([label for label in example.labels[first:] if label != IGNORE] for example in examples)

    def __getitem__(self, split: str) -> Sequence[Example]:
        examples: Sequence[Example] = getattr(self, split)
        return examples


class Blocks(Sequence[Example]):
    """Language modelling: a long stream of tokens in consecutive blocks of ``length``, all of them targets.

    The last token of a block is the first of the next: nothing predicts a block's first token, so each token
    of the stream but its very first is predicted exactly once.
    """

    def __init__(self, stream: NDArray[np.int32], length: int) -> None:
        self.stream, self.length = stream, length

    def __len__(self) -> int:
        return max(0, -(-(len(self.stream) - 1) // (self.length - 1)))

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(index)
        start = position * (self.length - 1)
        ids = self.stream[start : start + self.length].tolist()
        return Example(input_ids=ids, labels=ids, target_tokens=len(ids) - 1)


def encode(splits: Splits, tokenizer: Any, task: str, max_length: int) -> Encoded:
    """Tokenize every split for ``task``; rows longer than ``max_length`` are cut, and counted.

    The prompt is cut from the left first, then the target from the right.
    """
    valid = KINDS_BY_TASK[task]
    if splits.kind not in valid:
        need = {
            "sequence_classification": "data.text and data.label",
            "seq2seq_lm": "data.prompt and data.target",
        }
        raise ConfigError(
            f"model.task={task} needs {need[task]}, but data {splits.name} holds "
            f"{'plain text' if splits.kind == 'text' else 'prompts and targets'}"
        )
    if splits.kind == "labels" and task == "causal_lm":
        log.warning(
            "data %s has labels, but model.task=causal_lm trains a language model to write the classes' names, and "
            "val/token_accuracy counts tokens, not rows; model.task=sequence_classification trains a classifier",
            splits.name,
        )
    encoder = Encoder(tokenizer, task, max_length)
    parts: dict[str, Sequence[Example]] = {}
    for split in SPLITS:
        rows = splits[split]
        parts[split] = encoder.blocks(rows) if splits.kind == "text" else encoder.examples(rows)
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


class Encoder:
    """A tokenizer, what it puts around a text, and the form of an example that a task wants."""

    def __init__(self, tokenizer: Any, task: str, max_length: int) -> None:
        self.tokenizer, self.task, self.max_length = tokenizer, task, max_length
        self.prefix, self.suffix = special_affixes(tokenizer)
        self.eos = tokenizer.eos_token_id
        if self.eos is None and task != "sequence_classification":
            raise ConfigError(
                f"model.tokenizer: {tokenizer.name_or_path or type(tokenizer).__name__} has no "
                f"end-of-sequence token, which model.task={task} needs to learn where a target ends"
            )

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        """One example a row, in order."""
        if self.task == "sequence_classification":
            return self.classes(rows)
        pair = self.causal if self.task == "causal_lm" else self.seq2seq
        prompts = self.plain([row.prompt for row in rows])
        targets = self.plain([row.target for row in rows])
        return [pair(prompt, target) for prompt, target in zip(prompts, targets, strict=True)]

    def causal(self, prompt: list[int], target: list[int]) -> Example:
        """prefix + prompt + target + eos; the loss is on target and eos."""
        target = [*target, self.eos]
        room = max(0, self.max_length - len(self.prefix) - len(target))
        kept = prompt[len(prompt) - room :] if room < len(prompt) else prompt
        head = self.prefix + kept
        ids = (head + target)[: self.max_length]
        labels = ([IGNORE] * len(head) + target)[: self.max_length]
        # the first position is never predicted: a causal loss shifts the labels by one
        counted = sum(label != IGNORE for label in labels[1:])
        return Example(ids, labels, counted, len(head) + len(target) > len(ids) or len(kept) < len(prompt))

    def seq2seq(self, prompt: list[int], target: list[int]) -> Example:
        """Source and target, each with its special tokens, each at most max_length long."""
        room = max(0, self.max_length - len(self.prefix) - len(self.suffix))
        end = self.suffix or [self.eos]
        wanted = self.prefix + target
        labels = wanted[: max(0, self.max_length - len(end))] + end
        ids = self.prefix + prompt[max(0, len(prompt) - room) :] + self.suffix
        return Example(ids, labels, len(labels), room < len(prompt) or len(labels) < len(wanted) + len(end))

    def classes(self, rows: Sequence[Row]) -> list[Example]:
        """The text as the tokenizer itself frames and truncates it (its truncation_side, right for most)."""
        if not rows:
            return []
        texts = [row.prompt for row in rows]
        cut = self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        room = self.max_length - len(self.prefix) - len(self.suffix)
        full = [len(ids) > room for ids in self.plain(texts)]
        return [Example(ids, [_label(row)], 1, long) for ids, row, long in zip(cut, rows, full, strict=True)]

    def blocks(self, rows: Sequence[Row]) -> Blocks:
        """Documents joined by eos (one before the first: its first token is predicted too), then cut."""
        parts = [np.array([self.eos], np.int32)]
        for start in range(0, len(rows), DOCUMENTS_PER_CALL):
            documents = [row.target for row in rows[start : start + DOCUMENTS_PER_CALL]]
            # a document that quotes "</s>" does not end there
            ids = self.plain(documents, split_special_tokens=True)
            parts += [np.array([*document, self.eos], np.int32) for document in ids]
        return Blocks(np.concatenate(parts) if rows else np.empty(0, np.int32), self.max_length)

    def plain(self, texts: Sequence[str], **options: Any) -> list[list[int]]:
        """Token ids, nothing cut, no special tokens (SentencePiece still marks the first word by a space)."""
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False, **options
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids


def special_affixes(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What a tokenizer puts around a text: Llama ([bos], []), T5 ([], [eos]), BERT ([cls], [sep])."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def _label(row: Row) -> int:
    if row.label is None:
        raise DataError(f"{row.where or 'a row'}: has no label")
    return row.label


def _truncated(examples: Sequence[Example]) -> int:
    return 0 if isinstance(examples, Blocks) else sum(example.truncated for example in examples)


def statistics(examples: Sequence[Example]) -> dict[str, int]:
    """rows, tokens, target_tokens and the longest row of one split."""
    if isinstance(examples, Blocks):
        total = len(examples.stream)
        longest = min(total, examples.length)
        return {
            "rows": len(examples),
            "tokens": total,
            "target_tokens": max(0, total - 1),
            "longest": longest,
        }
    lengths = [len(example.input_ids) for example in examples]
    return {
        "rows": len(examples),
        "tokens": sum(lengths),
        "target_tokens": sum(example.target_tokens for example in examples),
        "longest": max(lengths, default=0),
    }

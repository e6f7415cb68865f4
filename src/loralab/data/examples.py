"""Rows in token ids: one example each, or blocks of a stream."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

IGNORE = -100  # the label that transformers' losses skip


@dataclass(frozen=True, slots=True)
class Example:
    """One row in token ids.

    causal_lm: ``labels`` aligned with ``input_ids``, -100 on the prompt; seq2seq_lm: source and target;
    sequence_classification: ``labels`` is [class index], or [score]. ``target_tokens`` counts what enters the loss.
    """

    input_ids: list[int]
    labels: list[Any]  # token ids; a class index; a score
    target_tokens: int
    truncated: bool = False
    token_type_ids: list[int] | None = None  # which text of a pair each token is of, where the model reads it


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


def statistics(examples: Sequence[Example]) -> dict[str, int]:
    """rows, tokens, target_tokens and the longest row of one split."""
    if isinstance(examples, Blocks):
        total = len(examples.stream)
        longest = min(total, examples.length)
        return {"rows": len(examples), "tokens": total, "target_tokens": max(0, total - 1), "longest": longest}
    lengths = [len(example.input_ids) for example in examples]
    return {
        "rows": len(examples),
        "tokens": sum(lengths),
        "target_tokens": sum(example.target_tokens for example in examples),
        "longest": max(lengths, default=0),
    }

"""From examples to tensors, and the order in which rows are trained on."""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loralab.data.examples import IGNORE, Example
from loralab.errors import DataError

Numbers = NDArray[np.int64]


def collate(examples: Sequence[Example], task: str, pad_token_id: int) -> dict[str, Tensor]:
    """Right-padded batch of int64: input_ids, attention_mask (B, T); labels (B, T), -100 on padding, or (B,), float32
    where they are scores; token_type_ids (B, T) where the examples have them."""
    inputs = _pad([example.input_ids for example in examples], pad_token_id)
    mask = _pad([[1] * len(example.input_ids) for example in examples], 0)
    if task == "sequence_classification":
        classes = [example.labels[0] for example in examples]
        labels = torch.tensor(classes, dtype=torch.float32 if isinstance(classes[0], float) else torch.int64)
    else:
        labels = _pad([example.labels for example in examples], IGNORE)
    types = [example.token_type_ids for example in examples if example.token_type_ids is not None]
    typed = {"token_type_ids": _pad(types, 0)} if types else {}
    return {"input_ids": inputs, "attention_mask": mask, **typed, "labels": labels}


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    out = np.full((len(rows), max(map(len, rows), default=0)), value, dtype=np.int64)
    for index, row in enumerate(rows):
        out[index, : len(row)] = row
    return torch.from_numpy(out)


class Order:
    """Rows in the order in which they train, without state: epoch e is a permutation drawn from (seed, e).

    An epoch is cut into sequences, which are counted from 0 across epochs: a row each or, with ``room``, consecutive
    rows of at most ``room`` tokens together (more only for one longer row), each sequence filled before the next
    begins. A position is a number of sequences, and what is taken from there on is the same bit for bit.
    """

    def __init__(self, lengths: Numbers, seed: int, room: int | None = None) -> None:
        """``lengths``: tokens of each row."""
        self.lengths, self.seed, self.room = lengths, seed, room
        self._firsts = [0]  # with ``room``: the first sequence of each epoch, as far as they are known
        self._epoch = -1
        self._rows = self._bounds = np.empty(0, np.int64)

    def take(self, first: int, batches: int, size: int) -> tuple[Numbers, Numbers]:
        """(rows, starts) of ``batches`` batches of ``size`` sequences, from sequence ``first`` on: indices of rows, and
        where in them each batch begins. Raises DataError where there is no row."""
        if not len(self.lengths):
            raise DataError("there is no training row to draw from")
        parts, ends = [], [np.zeros(1, np.int64)]
        last = first + batches * size
        while first < last:
            epoch, start = self._find(first)
            rows, bounds = self._cut(epoch)
            stop = min(start + last - first, len(bounds) - 1)
            parts.append(rows[bounds[start] : bounds[stop]])
            ends.append(bounds[start + 1 : stop + 1] - bounds[start] + ends[-1][-1])
            first += stop - start
        return np.concatenate(parts), np.concatenate(ends)[:-1:size]

    def count(self, epoch: int = 0) -> int:
        """Sequences of an epoch."""
        return len(self._cut(epoch)[1]) - 1

    def _find(self, sequence: int) -> tuple[int, int]:
        """(epoch, number within it) of a sequence."""
        if self.room is None:
            return divmod(sequence, len(self.lengths))
        while self._firsts[-1] <= sequence:
            self._firsts.append(self._firsts[-1] + self.count(len(self._firsts) - 1))
        epoch = bisect_right(self._firsts, sequence) - 1
        return epoch, sequence - self._firsts[epoch]

    def _cut(self, epoch: int) -> tuple[Numbers, Numbers]:
        """(rows, bounds) of an epoch: sequence i is rows[bounds[i] : bounds[i + 1]]."""
        if epoch != self._epoch:
            n = len(self.lengths)
            self._epoch, self._rows = epoch, permutation(n, self.seed, epoch)
            self._bounds = np.arange(n + 1) if self.room is None else filled(self.lengths[self._rows], self.room)
        return self._rows, self._bounds


def filled(lengths: Numbers, room: int) -> Numbers:
    """Bounds of the sequences of at most ``room`` tokens that rows of these lengths fill one after the other (next-fit,
    Johnson 1973): 0, then where each sequence ends."""
    total = np.concatenate([[0], np.cumsum(lengths)])
    bounds = [0]
    while bounds[-1] < len(lengths):
        start = bounds[-1]
        bounds.append(max(start + 1, int(np.searchsorted(total, total[start] + room, "right")) - 1))
    return np.array(bounds, np.int64)


def permutation(n: int, seed: int, epoch: int) -> Numbers:
    """A permutation of range(n) by sorting raw Philox words, which numpy keeps stable (NEP 19)."""
    words = np.random.Philox(key=[seed % 2**64, epoch]).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int64)

"""From examples to tensors, and the order in which samples are consumed."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loralab.data.examples import IGNORE, Example
from loralab.errors import DataError


def collate(examples: Sequence[Example], task: str, pad_token_id: int) -> dict[str, Tensor]:
    """Right-padded batch of int64: input_ids, attention_mask (B, T); labels (B, T), -100 on padding, or (B,), float32
    where they are scores; token_type_ids (B, T) where the examples have them."""
    inputs = _pad([example.input_ids for example in examples], pad_token_id)
    mask = _pad([[1] * len(example.input_ids) for example in examples], 0)
    if task == "sequence_classification":
        own = [example.labels[0] for example in examples]
        labels = torch.tensor(own, dtype=torch.float32 if isinstance(own[0], float) else torch.int64)
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


class Stream:
    """Sample order without state: epoch e is a permutation of range(n) drawn from (seed, e).

    ``position`` counts consumed samples and is all that a checkpoint needs: a stream restarted there
    continues bit for bit, also across the boundary of an epoch.
    """

    def __init__(self, n: int, seed: int, position: int = 0) -> None:
        self.n, self.seed, self.position = n, seed, position
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, np.int64)

    def take(self, k: int) -> list[int]:
        """The indices of the next ``k`` samples. Raises DataError where there are none."""
        if self.n < 1:
            raise DataError("there is no training row to draw from")
        taken: list[int] = []
        while len(taken) < k:
            epoch, start = divmod(self.position, self.n)
            if epoch != self._epoch:
                self._epoch, self._order = epoch, permutation(self.n, self.seed, epoch)
            part = self._order[start : start + k - len(taken)].tolist()
            taken += part
            self.position += len(part)
        return taken


def permutation(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of range(n) by sorting raw Philox words, which numpy keeps stable (NEP 19)."""
    words = np.random.Philox(key=[seed % 2**64, epoch]).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int64)

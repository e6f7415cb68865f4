"""The position of a trial in its data: which rows each optimizer step takes, as batches."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from loralab.adapters.dropout import Share
from loralab.data.batches import Order, collate
from loralab.data.encoding import IGNORE, Encoded, Example
from loralab.data.passes import Rows

Batch = dict[str, Any]


class DataCursor:
    """Batches of one trial. The order of the rows follows from the seed and the step alone.

    A batch is {tensors, rows, chosen, target_tokens, tokens}. ``chosen`` identifies rows, so that rows which several
    trials share are found.
    """

    def __init__(
        self,
        data: Encoded,
        task: str,
        pad_token_id: int,
        seed: int,
        batch_size: int,
        micros: int,
        packing_length: int | None = None,
        ranks: tuple[int, int] = (0, 1),
    ) -> None:
        """``micros``: micro-batches of an optimizer step (trainer.accumulate_grad_batches). ``packing_length``: a
        training batch is of ``batch_size`` packed sequences of at most so many tokens; None: of as many rows.
        ``ranks``: (this process, how many share every batch)."""
        self.data, self.task, self.pad_token_id = data, task, pad_token_id
        self.seed, self.batch_size, self.micros, self.packing_length = seed, batch_size, micros, packing_length
        self.ranks = ranks
        self.step = 0

    @cached_property
    def order(self) -> Order:
        """The order of the training rows."""
        return Order(Rows.of(self.data.train).inputs, self.seed, self.packing_length)

    def seek(self, step: int) -> None:
        """Moves to the position after ``step`` optimizer steps."""
        self.step = step

    def peek(self, step: int) -> Batch:
        """The first micro-batch after ``step`` optimizer steps; the cursor does not move."""
        batch = next(self._training_batches(step, 1))
        return {**batch, "step_targets": batch["target_tokens"], "micro": 0}

    def step_batches(self) -> Iterator[Batch]:
        """The micro-batches of the next optimizer step; ``step_targets`` counts the target tokens of the whole step."""
        batches = list(self._training_batches(self.step, self.micros))
        self.step += 1
        targets = sum(batch["target_tokens"] for batch in batches)
        for micro, batch in enumerate(batches):
            yield {**batch, "step_targets": targets, "micro": micro}

    def _training_batches(self, step: int, count: int) -> Iterator[Batch]:
        rank, ranks = self.ranks
        first, size = step * self.micros * self.batch_size, self.batch_size // ranks
        rows, starts = self.order.take(first, count * ranks, size)
        parts = [self._batch(self.data.train, chosen.tolist()) for chosen in np.split(rows, starts[1:])]
        for at in range(0, len(parts), ranks):
            yield parts[at] if ranks == 1 else _shared(parts[at : at + ranks], rank)

    def evaluation_batches(self, examples: Sequence[Example], size: int) -> Iterator[Batch | None]:
        """All of the examples, ``size`` in a batch, in their order; None for a batch of which only other processes have
        rows."""
        rank, ranks = self.ranks
        own = -(-size // ranks)
        for start in range(0, len(examples), size):
            stop = min(start + size, len(examples))
            chosen = range(min(start + rank * own, stop), min(start + (rank + 1) * own, stop))
            yield self._batch(examples, chosen) if chosen else None

    def first(self, examples: Sequence[Example]) -> Batch:
        """The first of the examples."""
        return self._batch(examples, [0])

    def _batch(self, examples: Sequence[Example], chosen: Sequence[int]) -> Batch:
        tensors = collate([examples[i] for i in chosen], self.task, self.pad_token_id)
        labels = tensors["labels"]
        predicted = labels[:, 1:] if self.task == "causal_lm" else labels
        regression = labels.is_floating_point()  # one score a row
        return {
            "tensors": tensors,
            "rows": len(chosen),
            "chosen": [(id(examples), row) for row in chosen],
            "target_tokens": len(chosen) if regression else int((predicted != IGNORE).sum()),
            "tokens": int(tensors["attention_mask"].sum()),
        }


def _shared(parts: Sequence[Batch], rank: int) -> Batch:
    """The part of process ``rank`` of a batch of which each process has one. Its counts of tokens are the whole
    batch's: losses are divided by them, and no row is counted twice."""
    rows, tokens = [part["rows"] for part in parts], [part["tokens"] for part in parts]
    share = Share(sum(rows[:rank]), sum(rows), sum(tokens[:rank]), sum(tokens))
    targets = sum(part["target_tokens"] for part in parts)
    return {**parts[rank], "target_tokens": targets, "tokens": share.tokens, "share": share}

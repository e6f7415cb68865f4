"""What the passes of a run are fed, known before a row is drawn: the order is a function of seed and epoch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from loralab.data.batches import Numbers, Order
from loralab.data.encoding import IGNORE, Blocks, Example

EPOCHS, ROWS = 10_000, 2**24  # at most that are looked at; in so many the heaviest pass, or one like it, has come


@dataclass(frozen=True)
class BatchShape:
    """One trial's batch in a pass: tokens of each row and of its labels (a class: 1), and how many are targets."""

    inputs: tuple[int, ...]
    labels: tuple[int, ...]
    targets: int

    @classmethod
    def of(cls, batch: Mapping[str, Any], task: str) -> "BatchShape":
        """The shape of a collated batch."""
        tensors: Mapping[str, Tensor] = batch["tensors"]
        inputs = tuple(int(n) for n in tensors["attention_mask"].sum(1))
        labels = inputs
        if task != "causal_lm":
            by_row = tensors["labels"].reshape(len(inputs), -1)
            labels = tuple(int(n) for n in (by_row != IGNORE).sum(1))
        return cls(inputs, labels, batch["target_tokens"])

    def in_fewer_rows(self, most: int) -> "BatchShape":
        """As many tokens and targets in ``most`` rows of unequal lengths; itself where it has no more rows."""
        if len(self.inputs) <= most:
            return self
        bounds = np.linspace(0, len(self.inputs), most + 1).astype(np.int64)
        inputs, labels = (np.add.reduceat(column, bounds[:-1]) for column in (self.inputs, self.labels))
        if len(set(inputs.tolist())) == 1:
            inputs[:2] += (1, -1)
        return BatchShape(tuple(inputs.tolist()), tuple(labels.tolist()), self.targets)


@dataclass(frozen=True)
class Pass:
    """The shapes of one pass. ``batches``: one of each trial, None where it has ended; ``length``: the tokens that all
    rows are padded to, None: those of the longest."""

    step: int  # counted from 1; 0: of no run
    batches: tuple[BatchShape | None, ...]
    length: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all rows, without padding."""
        return sum(n for batch in self.present for n in batch.inputs)

    def in_fewer_rows(self, most: int) -> "Pass":
        """As many tokens, targets and padded positions in at most ``most`` unequal rows a batch: without padding and
        with fused attention, memory depends on tokens alone. Itself where all rows have one length."""
        lengths = [n for batch in self.present for n in batch.inputs]
        batches = tuple(batch and batch.in_fewer_rows(most) for batch in self.batches)
        fewer = sum(len(batch.inputs) for batch in batches if batch is not None)
        if fewer == len(lengths) or len(set(lengths)) == 1:
            return self
        return Pass(self.step, batches, -(-len(lengths) * max(lengths) // fewer))

    @property
    def present(self) -> list[BatchShape]:
        """The batches of the trials that have not ended."""
        return [batch for batch in self.batches if batch is not None]


@dataclass(frozen=True)
class Rows:
    """The tokens of each row of a split, of its labels, and how many are targets."""

    inputs: Numbers
    labels: Numbers
    targets: Numbers

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Rows":
        """The counts of ``examples``, made once for the trials that share them."""
        cached = _counted.get(id(examples))
        if cached is None or cached[0] is not examples:
            if len(_counted) > 3:
                _counted.clear()
            cached = _counted[id(examples)] = (examples, _count(examples))
        return cached[1]

    def shape(self, rows: Sequence[int] | Numbers) -> BatchShape:
        """The shape of a batch of ``rows``, indices in this order."""
        at = np.asarray(rows, np.int64)
        inputs, labels = (tuple(int(n) for n in column[at]) for column in (self.inputs, self.labels))
        return BatchShape(inputs, labels, int(self.targets[at].sum()))


_counted: dict[int, tuple[Sequence[Example], Rows]] = {}


def _count(examples: Sequence[Example]) -> Rows:
    if isinstance(examples, Blocks):
        lengths = np.full(len(examples), examples.length, np.int64)
        if len(lengths):
            lengths[-1] = len(examples[-1].input_ids)
        return Rows(lengths, lengths, lengths - 1)
    columns = zip(*((len(e.input_ids), len(e.labels), e.target_tokens) for e in examples), strict=True)
    return Rows(*(np.array(column, np.int64) for column in columns)) if len(examples) else Rows(*[_none()] * 3)


def _none() -> Numbers:
    return np.empty(0, np.int64)


@dataclass(frozen=True)
class Feed:
    """Where a trial's rows come from: optimizer steps ``start`` (0 at first) to ``stop`` are to be made.

    ``batch_size`` counts sequences: rows, or with ``packing_length`` packed ones of at most so many tokens.
    """

    rows: Rows
    seed: int
    batch_size: int
    micros: int
    start: int
    stop: int
    packing_length: int | None = None

    @classmethod
    def of(cls, spec: Any, examples: Sequence[Example], start: int = 0, stop: int | None = None) -> "Feed":
        """The feed of a trial by its spec; ``stop`` None: to the last step."""
        trainer = spec.trainer
        last = trainer.max_steps if stop is None else stop
        micros = trainer.accumulate_grad_batches
        length = spec.packing_length
        return cls(Rows.of(examples), spec.seed, spec.data.batch_size, micros, start, last, length)

    def chosen(self) -> "Chosen":
        """The rows of each pass that is to be made, of at most EPOCHS epochs and about ROWS rows."""
        n, size = len(self.rows.inputs), self.batch_size * self.micros
        order = Order(self.rows.inputs, self.seed, self.packing_length)
        steps = min(self.stop - self.start, EPOCHS * n // size, ROWS * order.count() // (size * max(1, n)))
        if steps < 1:
            return Chosen(self.rows, _none(), _none())
        return Chosen(self.rows, *order.take(self.start * size, steps * self.micros, self.batch_size))


@dataclass(frozen=True)
class Chosen:
    """The rows of consecutive passes of a trial: indices ``at`` of its rows, and where in them each pass begins."""

    rows: Rows
    at: Numbers
    starts: Numbers

    def __len__(self) -> int:
        return len(self.starts)

    def shape(self, number: int) -> BatchShape | None:
        """The batch of a pass; None behind the last."""
        if number >= len(self):
            return None
        stop = self.starts[number + 1] if number + 1 < len(self) else len(self.at)
        return self.rows.shape(self.at[self.starts[number] : stop])

    def counts(self) -> Numbers:
        """Rows of each pass."""
        return np.diff(self.starts, append=len(self.at))


@dataclass(frozen=True)
class Weighing:
    """What makes a pass heavy.

    ``flat``: rows are computed without padding, else padding weighs as tokens do. ``apart``: inputs and labels are
    sequences of their own (encoder-decoder). ``spiky``: (N, length) where every N-th step is padded to that length.
    """

    flat: bool
    apart: bool = False
    spiky: tuple[int, int] | None = None

    def length(self, step: int) -> int | None:
        """What the rows of a step are lengthened to, if they are."""
        return self.spiky[1] if self.spiky is not None and step % self.spiky[0] == 0 else None


def heaviest(feeds: Sequence[Feed], by: Weighing) -> tuple[Pass, ...]:
    """The pass with the most tokens, the one with more targets among equals, then the first; and beside it the pass
    before it, or after, of the same step. In their order; empty where no step is left."""
    chosen, micros = [feed.chosen() for feed in feeds], feeds[0].micros
    if not max(map(len, chosen)):
        return ()
    start = feeds[0].start
    step, micro = divmod(_heaviest(chosen, by, start, micros), micros)
    neighbours = {micro - 1, micro} if micro else {0, min(1, micros - 1)}
    number = start + step + 1
    shapes = [tuple(own.shape(step * micros + at) for own in chosen) for at in sorted(neighbours)]
    return tuple(Pass(number, batches, by.length(number)) for batches in shapes)


def _heaviest(chosen: Sequence[Chosen], by: Weighing, start: int, micros: int) -> int:
    """The number of the heaviest pass; the first pass is of step ``start`` + 1."""
    passes = max(map(len, chosen))
    tokens, targets, count = (np.zeros(passes, np.int64) for _ in range(3))
    longest = np.zeros((2, passes), np.int64)
    for own in filter(len, chosen):
        columns = [own.rows.inputs[own.at], own.rows.labels[own.at]][: 2 if by.apart else 1]
        tokens[: len(own)] += sum(np.add.reduceat(column, own.starts) for column in columns)
        targets[: len(own)] += np.add.reduceat(own.rows.targets[own.at], own.starts)
        count[: len(own)] += own.counts()
        for place, column in enumerate(columns):
            highest = longest[place, : len(own)]
            np.maximum(highest, np.maximum.reduceat(column, own.starts), out=highest)
    if by.spiky:
        lengthened = np.array([by.length(start + number // micros + 1) or 0 for number in range(passes)])
        longest[0] = np.maximum(longest[0], lengthened)
    weight = tokens if by.flat else count * longest.sum(0)
    return int(np.argmax(weight * (1 + int(targets.max())) + targets))


def heaviest_evaluation(splits: Sequence[tuple[Sequence[Example], int]], by: Weighing) -> tuple[int, Pass] | None:
    """(number, the pass) of a validation of trials, each (its examples, its batch size); None where there is none."""
    rows = [Rows.of(examples) for examples, _ in splits]
    cut = [
        [np.arange(start, min(start + size, len(own.inputs))) for start in range(0, len(own.inputs), size)]
        for own, (_, size) in zip(rows, splits, strict=True)
    ]
    shapes = [[own.shape(at) for at in batches] for own, batches in zip(rows, cut, strict=True)]
    count = max(map(len, shapes), default=0)
    passes = [Pass(0, tuple(own[k] if k < len(own) else None for own in shapes)) for k in range(count)]
    return max(enumerate(passes), key=lambda numbered: weight(numbered[1], by)) if passes else None


def weight(shapes: Pass, by: Weighing) -> tuple[int, int]:
    """What a pass takes, to be compared with others: its tokens (with padding, unless flat), then its targets."""
    columns = [[n for batch in shapes.present for n in batch.inputs]]
    columns += [[n for batch in shapes.present for n in batch.labels]] if by.apart else []
    size = sum(sum(c) if by.flat else len(c) * max(c) for c in columns)
    return size, sum(batch.targets for batch in shapes.present)


def fullest(rows: Rows, batch_size: int, packing_length: int | None = None) -> BatchShape:
    """The largest batch that the rows can make, in whatever order: the longest rows, with the most targets among
    equals; a row comes twice where a batch holds more rows than there are. With ``packing_length`` each sequence takes
    the longest rows that still fit."""
    order = np.lexsort((rows.targets, rows.inputs + rows.labels))[::-1]
    if packing_length is None:
        return rows.shape(np.tile(order, -(-batch_size // len(order)))[:batch_size])
    batch: list[int] = []
    unused: list[int] = []
    for _ in range(batch_size):
        room = packing_length
        longer: list[int] = []  # than the room that is left
        for row in unused or order.tolist():
            fits = rows.inputs[row] <= room or room == packing_length
            room -= int(rows.inputs[row]) if fits else 0
            (batch if fits else longer).append(row)
        unused = longer
    return rows.shape(batch)

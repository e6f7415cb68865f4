"""What the passes of a run are fed, known before a row is drawn: the order is a function of seed and epoch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from loralab.data.batches import permutation
from loralab.data.encoding import IGNORE, Blocks, Example

Numbers = NDArray[np.int64]
EPOCHS = 10_000  # that are looked at; where a run has more, its rows are few and come round often enough


@dataclass(frozen=True)
class Fed:
    """One trial's part of a pass: tokens of each row and of its labels (a class: 1), and how many are targets."""

    inputs: tuple[int, ...]
    labels: tuple[int, ...]
    targets: int

    @classmethod
    def of(cls, batch: Mapping[str, Any], task: str) -> "Fed":
        """A batch that has been collated."""
        tensors: Mapping[str, Tensor] = batch["tensors"]
        inputs = tuple(int(n) for n in tensors["attention_mask"].sum(1))
        labels = inputs
        if task != "causal_lm":
            own = tensors["labels"].reshape(len(inputs), -1)
            labels = tuple(int(n) for n in (own != IGNORE).sum(1))
        return cls(inputs, labels, batch["target_tokens"])


@dataclass(frozen=True)
class Pass:
    """One pass. ``fed``: a part of each trial, None where one has ended; ``length``: what all rows are padded to, null:
    the longest of them."""

    step: int  # counted from 1; 0: of no run
    fed: tuple[Fed | None, ...]
    length: int | None = None

    @property
    def tokens(self) -> int:
        """Of all rows, padding not counted."""
        return sum(n for fed in self.taking for n in fed.inputs)

    @property
    def taking(self) -> list[Fed]:
        """The parts that are there."""
        return [fed for fed in self.fed if fed is not None]


@dataclass(frozen=True)
class Rows:
    """Of each row of a split: tokens, tokens of its labels, targets."""

    inputs: Numbers
    labels: Numbers
    targets: Numbers

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Rows":
        """Counted once for the trials that share ``examples``."""
        kept = _counted.get(id(examples))
        if kept is None or kept[0] is not examples:
            if len(_counted) > 3:
                _counted.clear()
            kept = _counted[id(examples)] = (examples, _count(examples))
        return kept[1]

    def fed(self, chosen: Sequence[int] | Numbers) -> Fed:
        """Those at these places, in this order."""
        at = np.asarray(chosen, np.int64)
        inputs, labels = (tuple(int(n) for n in column[at]) for column in (self.inputs, self.labels))
        return Fed(inputs, labels, int(self.targets[at].sum()))


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
    """Where a trial's rows come from: optimizer steps ``start`` (0 at first) to ``stop`` are to be made."""

    rows: Rows
    seed: int
    batch_size: int
    micros: int
    start: int
    stop: int

    @classmethod
    def of(cls, spec: Any, examples: Sequence[Example], start: int = 0, stop: int | None = None) -> "Feed":
        """Of a trial's spec, in its order; ``stop`` None: to the last step."""
        trainer = spec.trainer
        last = trainer.max_steps if stop is None else stop
        micros = trainer.accumulate_grad_batches
        return cls(Rows.of(examples), spec.seed, spec.data.batch_size, micros, start, last)

    def chosen(self) -> Numbers:
        """Rows of each pass, (steps, micros, batch_size)."""
        n, size = len(self.rows.inputs), self.batch_size * self.micros
        steps = max(0, min(self.stop - self.start, EPOCHS * n // size))
        first, last = self.start * size, (self.start + steps) * size
        if last == first:
            return np.empty((0, self.micros, self.batch_size), np.int64)
        epochs = range(first // n, (last - 1) // n + 1)
        order = np.concatenate([permutation(n, self.seed, epoch) for epoch in epochs])
        skipped = first - epochs[0] * n
        return order[skipped : skipped + last - first].reshape(steps, self.micros, self.batch_size)


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
    chosen = [feed.chosen() for feed in feeds]
    steps = max((len(own) for own in chosen), default=0)
    if not steps:
        return ()
    start = feeds[0].start
    step, micro = _heaviest([feed.rows for feed in feeds], chosen, by, start)
    both = {micro - 1, micro} if micro else {0, min(1, feeds[0].micros - 1)}

    def made(at: int) -> Pass:
        fed = [f.rows.fed(own[step, at]) if step < len(own) else None for f, own in zip(feeds, chosen, strict=True)]
        return Pass(start + step + 1, tuple(fed), by.length(start + step + 1))

    return tuple(made(at) for at in sorted(both))


def _heaviest(rows: Sequence[Rows], chosen: Sequence[Numbers], by: Weighing, start: int) -> tuple[int, int]:
    """(step, micro) among ``chosen``, of each trial (steps, micros, batch_size)."""
    shape = (max(map(len, chosen)), chosen[0].shape[1])
    tokens, targets, count = (np.zeros(shape, np.int64) for _ in range(3))
    longest = np.zeros((2, *shape), np.int64)
    for own, at in zip(rows, chosen, strict=True):
        made = slice(0, len(at))
        columns = [own.inputs[at], own.labels[at]] if by.apart else [own.inputs[at]]
        tokens[made] += sum(column.sum(-1) for column in columns)
        targets[made] += own.targets[at].sum(-1)
        count[made] += at.shape[-1]
        for place, column in enumerate(columns):
            longest[place, made] = np.maximum(longest[place, made], column.max(-1))
    lengthened = np.array([by.length(start + step + 1) or 0 for step in range(shape[0])]) if by.spiky else None
    if lengthened is not None:
        longest[0] = np.maximum(longest[0], lengthened[:, None])
    weight = tokens if by.flat else count * longest.sum(0)
    step, micro = np.unravel_index(np.argmax(weight * (1 + int(targets.max())) + targets), shape)
    return int(step), int(micro)


def heaviest_evaluation(splits: Sequence[tuple[Sequence[Example], int]], by: Weighing) -> tuple[int, Pass] | None:
    """(number, the pass) of a validation of trials, each (its examples, its batch size); None where there is none."""
    rows = [Rows.of(examples) for examples, _ in splits]
    cut = [
        [np.arange(start, min(start + size, len(own.inputs))) for start in range(0, len(own.inputs), size)]
        for own, (_, size) in zip(rows, splits, strict=True)
    ]
    fed = [[own.fed(at) for at in batches] for own, batches in zip(rows, cut, strict=True)]
    count = max(map(len, fed), default=0)
    passes = [Pass(0, tuple(own[k] if k < len(own) else None for own in fed)) for k in range(count)]
    return max(enumerate(passes), key=lambda one: _weight(one[1], by)) if passes else None


def _weight(one: Pass, by: Weighing) -> tuple[int, int]:
    columns = [[n for fed in one.taking for n in fed.inputs]]
    columns += [[n for fed in one.taking for n in fed.labels]] if by.apart else []
    size = sum(sum(c) if by.flat else len(c) * max(c) for c in columns)
    return size, sum(fed.targets for fed in one.taking)


def fullest(rows: Rows, batch_size: int) -> Fed:
    """The largest batch that the rows can make, in whatever order: the longest rows, with the most targets among
    equals; a row comes twice where a batch holds more rows than there are."""
    order = np.lexsort((rows.targets, rows.inputs + rows.labels))[::-1]
    return rows.fed(np.tile(order, -(-batch_size // len(order)))[:batch_size])

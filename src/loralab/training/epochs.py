"""Settings that count in epochs or batches, once the rows are known: as steps, and as rows of a split."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from loralab.data.base import Splits
from loralab.data.batches import Order
from loralab.data.encoding import Encoded, Example
from loralab.data.examples import Blocks, statistics
from loralab.data.passes import Rows
from loralab.errors import ConfigError
from loralab.training.specs import TrialSpec

LIMITING = ("limit_val_batches", "limit_test_batches", "overfit_batches", "fast_dev_run")
LIMITS = {"train": (), "validation": ("limit_val_batches",), "test": ("limit_test_batches",)}


def settled(spec: TrialSpec, data: Encoded) -> TrialSpec:
    """``spec`` with max_steps and val_check_interval as numbers of steps; itself where it counts in no epochs.

    An epoch is every training row once: after ``max_epochs`` of them each row was trained on so often. Batches run on
    across its end, so that only the last step of all may reach into a further epoch. Raises ConfigError where the
    schedule has no rate for a step of them.
    """
    trainer, given = spec.trainer, spec.trainer.decisive
    names = ("max_epochs", "min_epochs", "check_val_every_n_epoch", "fast_dev_run")
    if not trainer.given(*names) or not len(data.train):
        return spec
    steps = {name: _steps(spec, data, int(given[name])) for name in names[:3] if name in given}
    ends = [trainer.max_steps, *([steps["max_epochs"]] if "max_epochs" in steps else [])]
    if dev := int(given.get("fast_dev_run", 0)):
        ends.append(math.ceil(dev / trainer.accumulate_grad_batches))
    least = max(int(given.get("min_steps", 0)), steps.get("min_epochs", 0))
    rest = {name: value for name, value in given.items() if name not in (*names[:3], "min_steps")}
    rest |= {"min_steps": least} if least else {}
    interval = steps.get("check_val_every_n_epoch", trainer.val_check_interval)
    # patience and keep_best are checked as they were given
    changed = replace(trainer, max_steps=min(ends), val_check_interval=interval, decisive=rest)
    if "max_epochs" in steps:
        spec.schedule.check(changed.max_steps, spec.optimizer.lr)
    spec = replace(spec, trainer=changed)
    return replace(spec, stops=(), callbacks=_without_files(spec.callbacks)) if dev else spec


def _without_files(callbacks: Mapping[str, Any]) -> dict[str, Any]:
    """The callbacks that Lightning keeps in a fast_dev_run: all but those that write checkpoints of its own form."""
    from lightning.pytorch.callbacks import Checkpoint

    kinds = {name: getattr(make, "func", make) for name, make in callbacks.items()}
    files = {name for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Checkpoint)}
    return {name: make for name, make in callbacks.items() if name not in files}


def _steps(spec: TrialSpec, data: Encoded, epochs: int) -> int:
    """Optimizer steps of so many epochs."""
    size, micros = spec.data.batch_size, spec.trainer.accumulate_grad_batches
    part = spec.trainer.decisive.get("limit_train_batches")
    if spec.packing_length is None:
        sequences = len(data.train) * epochs
    else:
        order = Order(Rows.of(data.train).inputs, spec.seed, spec.packing_length)
        sequences = sum(order.count(epoch) for epoch in range(epochs))
    batches = math.ceil(sequences / size)
    if part is not None:
        batches = epochs * _batches(part, math.ceil(sequences / epochs / size), "limit_train_batches")
    return math.ceil(batches / micros)


def _batches(part: int | float, count: int, name: str) -> int:
    """How many of ``count`` batches a limit leaves. Raises ConfigError where that is none."""
    left = min(part, count) if isinstance(part, int) else int(count * part)
    if count and not left:
        raise ConfigError(
            f"trainer.{name}={part} leaves none of {count} batches; valid: at least {1 / count:.3g}, or 1"
        )
    return int(left)


def limited(data: Encoded, spec: TrialSpec) -> Encoded:
    """``data`` with the rows that ``overfit_batches``, ``fast_dev_run`` and the limits of the trainer leave: the first
    batches of a split. Itself where there is no limit."""
    given, size = spec.trainer.decisive, spec.data.batch_size
    kept: dict[str, int] = {}
    for split, names in LIMITS.items():
        names = (*names, *(() if split == "test" else ("overfit_batches",)))
        names = (*names, *(() if split == "train" else ("fast_dev_run",)))
        for name in names:
            if name in given:
                part = int(given[name]) if isinstance(given[name], bool) else given[name]
                rows = _batches(part, math.ceil(len(data[split]) / size), name) * size
                kept[split] = min(rows, kept.get(split, len(data[split])))
    kept = {split: rows for split, rows in kept.items() if rows < len(data[split])}
    if not kept:
        return data
    parts = {split: _first(data[split], rows) for split, rows in kept.items()}
    tokens = data.tokens | {split: statistics(part) for split, part in parts.items()}
    return replace(data, **cast(Any, parts), tokens=tokens, splits=_cut(data.splits, kept, spec.metric))


def _first(examples: Sequence[Example], count: int) -> Sequence[Example]:
    if isinstance(examples, Blocks):
        return Blocks(examples.stream[: count * (examples.length - 1) + 1], examples.length)
    return examples[:count]


def _cut(splits: Splits, kept: Mapping[str, int], metric: str) -> Splits:
    """``splits`` with so many rows; of plain text, whose rows are no blocks, without its bytes, which are of all."""
    if splits.kind != "text":
        cut: dict[str, Any] = {split: splits[split][:rows] for split, rows in kept.items()}
        return replace(splits, **cut)
    if metric.endswith("/bits_per_byte"):
        raise ConfigError(
            f"metric={metric} is of whole documents, and a limit of the trainer scores a part of them; valid: val/loss"
        )
    return replace(splits, bytes={split: size for split, size in splits.bytes.items() if split not in kept})

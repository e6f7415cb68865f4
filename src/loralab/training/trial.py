"""A trial: its settings and keys, its step, its adapter, its data stream, its metrics and its record."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loralab.adapters.base import Adapter
from loralab.adapters.sites import mix
from loralab.data.batches import Stream, collate
from loralab.data.encoding import Encoded
from loralab.errors import DivergedError, LoralabError
from loralab.optim.optimizers import AdamW, Schedule, State
from loralab.records import record
from loralab.records.jsonl import MetricsFile
from loralab.records.wandb import Mirror

log = logging.getLogger(__name__)

Batch = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a trial may differ in from the others of its pack."""

    id: str
    folder: Path
    seed: int
    optimizer: AdamW
    schedule: Schedule
    max_steps: int
    batch_size: int
    gradient_clip_val: float | None
    accumulate_grad_batches: int = 1
    log_every_n_steps: int = 1
    patience: int | None = None  # validations without a better metric after which the trial ends
    metric: str = "val/loss"
    metric_mode: str = "min"


@dataclass
class Trial:
    """One run of the experiment, alone on the base or beside others."""

    settings: Settings
    adapter: Adapter
    data: Encoded
    task: str
    pad_token_id: int
    record: dict[str, Any]
    step: int = 0
    tokens: int = 0  # seen in training, padding not counted
    failure: LoralabError | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    sinks: list[Any] = field(default_factory=list)
    validated: int = -1  # the step of the last validation
    seconds: float = 0.0  # of training, in all its fits
    untimed: int = 0  # tokens of steps that no timing counts
    optimizer_state: State = field(default_factory=dict)  # on the host, between fits; empty before the first step
    told: int = -1  # rows up to this step are in metrics.jsonl already
    best: float | None = None  # the metric's best value in a validation
    waited: int = 0  # validations since then
    judged: int = -1  # the step of the last one

    def __post_init__(self) -> None:
        self._place()
        self.started = time.monotonic()

    def _place(self) -> None:
        """What is not finished is forgotten."""
        self.stream, self._finished_tokens = self._stream(), self.tokens

    def _stream(self) -> Stream:
        """The data where the last finished step left it."""
        size = self.settings.batch_size * self.settings.accumulate_grad_batches
        return Stream(len(self.data.train), self.settings.seed, position=self.step * size)

    def peek(self) -> Batch:
        """The first micro-batch of the next step, not taken."""
        batch = self._batch(self.data.train, self._stream().take(self.settings.batch_size))
        return {**batch, "step_targets": batch["target_tokens"], "micro": 0}

    @property
    def alive(self) -> bool:
        """Whether it still trains."""
        return self.failure is None and not self.stopped and self.step < self.settings.max_steps

    @property
    def stopped(self) -> bool:
        """Whether it has lost its patience."""
        return self.settings.patience is not None and self.waited >= self.settings.patience

    def sure(self, interval: int) -> int:
        """The step up to which it trains whatever the validations, one every ``interval`` steps, say; its last one
        where it is patient."""
        patience = self.settings.patience
        if patience is None or not interval:
            return self.settings.max_steps
        left = patience + 1 if self.best is None else patience - self.waited
        return min(self.settings.max_steps, (self.step // interval + left) * interval)

    def judge(self, value: float) -> None:
        """Takes note of the metric in a validation, from which early stopping follows."""
        mine = self.settings
        if self.judged == self.step:  # before a run was continued
            return
        self.judged = self.step
        first = self.best is None or self.best != self.best
        if first or (value < self.best if mine.metric_mode == "min" else value > self.best):  # type: ignore[operator]
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if mine.patience == self.waited and self.step < mine.max_steps:
            text = "%s ends at step %d: %s has not been better than %.4g in %d validation%s"
            log.info(text, mine.id, self.step, mine.metric, self.best, self.waited, "s" * (self.waited > 1))

    def advance(self) -> None:
        """An optimizer step is finished."""
        self.step += 1
        self._finished_tokens = self.tokens

    def factor(self) -> Callable[[int], float]:
        """The schedule over the steps that a fit from here will make."""
        at, start = self.settings.schedule.factor(self.settings.max_steps), self.step
        return lambda done: at(start + done)

    def rewind(self, state: State | None) -> bool:
        """Back to the end of the last finished step, after a fit that broke off; ``state``: its optimizer's.

        False where the update itself was cut short: some parameters or moments are a step ahead, or ``state`` could
        not be kept.
        """
        self.tokens = self._finished_tokens
        self._place()
        for parameter in self.adapter.parameters():
            parameter.grad = None
        self.optimizer_state = (state or {}) if self.step else {}
        if not self.alive:
            return True
        return self.in_step(state or {}) and (state is not None or not self.step)

    def in_step(self, state: State) -> bool:
        """Whether an optimizer's state is that of the last finished step: an update may be cut short."""
        return all(int(one.get("step", 0)) <= self.step for one in state.values())

    def restart(self, adapter: Adapter) -> None:
        """From the first step on, with an adapter drawn anew; rows that were written are not written again."""
        self.adapter, self.told = adapter, max(self.told, self.step)
        self.step = self.tokens = 0
        self.optimizer_state, self.validated, self.metrics = {}, -1, {}
        self.best, self.waited, self.judged = None, 0, -1
        self._place()

    def key(self, micro: int) -> int:
        """What decides every dropout mask of one pass of this trial."""
        return mix(self.settings.seed, self.step, micro)

    def window(self) -> Iterator[Batch]:
        """The micro-batches of the next optimizer step, each knowing the target tokens of the whole step."""
        size, micros = self.settings.batch_size, self.settings.accumulate_grad_batches
        chosen = self.stream.take(size * micros)
        batches = [self._batch(self.data.train, chosen[i * size : (i + 1) * size]) for i in range(micros)]
        targets = sum(batch["target_tokens"] for batch in batches)
        for micro, batch in enumerate(batches):
            yield {**batch, "step_targets": targets, "micro": micro}

    def evaluation_batches(self, split: str) -> Iterator[Batch]:
        """The whole split in its own order."""
        examples = getattr(self.data, split)
        for start in range(0, len(examples), self.settings.batch_size):
            stop = min(start + self.settings.batch_size, len(examples))
            yield self._batch(examples, list(range(start, stop)))

    def _batch(self, examples: Any, chosen: list[int]) -> Batch:
        tensors = collate([examples[i] for i in chosen], self.task, self.pad_token_id)
        labels = tensors["labels"]
        shifted = labels[:, 1:] if self.task == "causal_lm" else labels
        return {
            "tensors": tensors,
            "rows": len(chosen),
            "chosen": [(id(examples), row) for row in chosen],  # what tells equal rows of several trials
            "target_tokens": int((shifted != -100).sum()) if not labels.is_floating_point() else len(chosen),
            "tokens": int(tensors["attention_mask"].sum()),
        }

    def fail(self, error: LoralabError) -> None:
        """Takes the trial out of the pack; the others go on."""
        self.failure = self.failure or error

    def diverge(self, what: str) -> None:
        self.fail(
            DivergedError(
                f"{what} is not finite at step {self.step + 1} (lr {self.settings.optimizer.lr:g}): a lower "
                "optimizer.lr, a warm-up or gradient clipping may help"
            )
        )

    def scored(self, values: Mapping[str, float]) -> None:
        """Takes what a split was scored by. A loss, or the metric, that is not finite is no result: the trial ends."""
        self.metrics.update(values)
        self.report(values)
        watched = [key for key in values if key.endswith("/loss") or key == self.settings.metric]
        if lost := next((key for key in watched if not math.isfinite(values[key])), None):
            why = (
                f"a lower optimizer.lr (now {self.settings.optimizer.lr:g}), a warm-up or gradient clipping may help"
                if self.step
                else "nothing was trained yet, so the base itself gives it: another model.dtype or trainer.precision,"
                " or other rows may help"
            )
            self.fail(DivergedError(f"{lost} is {values[lost]:g} after step {self.step}: {why}"))

    def vanish(self) -> None:
        """A loss without any gradient: the adapter has saturated the base, and no further step would move it."""
        self.fail(
            DivergedError(
                f"the gradient is exactly zero at step {self.step + 1} while the loss is not (lr"
                f" {self.settings.optimizer.lr:g}): the adapter has grown beyond repair; try a lower optimizer.lr"
            )
        )

    def report(self, values: Mapping[str, float], under_way: bool = False) -> None:
        """Rows for metrics.jsonl and its mirror, at the trial's own step: the last finished one, or the one
        ``under_way``."""
        step = self.step + (under_way and self.alive)
        if step <= self.told:
            return
        for sink in self.sinks:
            (sink.write if isinstance(sink, MetricsFile) else sink.log)(step, values)

    def open(self, mirror: Mirror) -> None:
        """Creates the run folder's metrics.jsonl and connects the mirror."""
        self.sinks = [MetricsFile(self.settings.folder / "metrics.jsonl", self.step), mirror]

    def sync(self) -> None:
        """What was reported is on disk."""
        for sink in self.sinks:
            if isinstance(sink, MetricsFile):
                sink.sync()

    def close(self, exit_code: int) -> None:
        """Finishes the sinks, on every path."""
        for sink in self.sinks:
            sink.close() if isinstance(sink, MetricsFile) else sink.finish(exit_code)
        self.sinks = []

    def save(self) -> None:
        """Writes the record as it stands."""
        record.write(self.settings.folder, self.record)

    def state_dict(self) -> dict[str, Any]:
        """All that a continuation needs: order and dropout follow from seed and step."""
        own = {"step": self.step, "tokens": self._finished_tokens, "optimizer": self.optimizer_state}
        judged = {"best": self.best, "waited": self.waited, "judged": self.judged}
        return {**own, **judged, "adapter": self.adapter.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        step, tokens, optimizer = int(state["step"]), int(state["tokens"]), dict(state.get("optimizer") or {})
        best, waited, judged = state.get("best"), int(state.get("waited", 0)), int(state.get("judged", -1))
        self.adapter.load_state_dict(state["adapter"], strict=True)  # nothing is taken up where something is missing
        self.step, self.tokens, self.optimizer_state = step, tokens, optimizer
        self.best, self.waited, self.judged = best, waited, judged
        self.untimed = self.tokens  # the seconds they took are another process's
        self._place()


class TrainPasses:
    """Training passes of a pack, sized for Lightning: each is {trial's index: micro-batch} of those still alive."""

    def __init__(self, trials: list[Trial]) -> None:
        self.trials = trials
        self.micros = trials[0].settings.accumulate_grad_batches

    def __len__(self) -> int:
        return max(trial.settings.max_steps - trial.step for trial in self.trials) * self.micros

    def __iter__(self) -> Iterator[dict[int, Batch]]:
        for _ in range(len(self) // self.micros):
            windows = {index: trial.window() for index, trial in enumerate(self.trials) if trial.alive}
            for _ in range(self.micros):
                yield {index: next(window) for index, window in windows.items()}


class EvaluationPasses:
    """Evaluation passes of a pack over one split; a trial with fewer batches drops out earlier."""

    def __init__(self, trials: list[Trial], split: str) -> None:
        self.trials, self.split = trials, split

    def __len__(self) -> int:
        return max(-(-len(getattr(trial.data, self.split)) // trial.settings.batch_size) for trial in self.trials)

    def __iter__(self) -> Iterator[dict[int, Batch]]:
        streams = {
            index: trial.evaluation_batches(self.split)
            for index, trial in enumerate(self.trials)
            if trial.failure is None
        }
        for _ in range(len(self)):
            drawn = {index: next(stream, None) for index, stream in streams.items()}
            yield {index: batch for index, batch in drawn.items() if batch is not None}


def stack(batches: Mapping[int, Batch], pad_token_id: int, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs and labels of all trials along dim 0, padded on the right to the longest of them."""
    tensors = [batch["tensors"] for batch in padded_alike(batches, pad_token_id).values()]
    stacked = {key: torch.cat([t[key] for t in tensors]) if len(tensors) > 1 else tensors[0][key] for key in tensors[0]}
    moved = {key: value.to(device, non_blocking=True) for key, value in stacked.items()}
    labels = moved.pop("labels")
    return moved, labels


def padded_alike(batches: Mapping[int, Batch], pad_token_id: int) -> dict[int, Batch]:
    """The batches padded on the right to the longest of them."""
    if len(batches) < 2:
        return dict(batches)
    fill = {"input_ids": pad_token_id, "attention_mask": 0, "token_type_ids": 0, "labels": -100}
    shapes = [(key, part.shape[-1]) for one in batches.values() for key, part in one["tensors"].items()]
    longest = {key: max((width for name, width in shapes if name == key), default=0) for key in fill}

    def padded(key: str, part: Tensor) -> Tensor:
        if part.dim() < 2 or part.shape[1] == longest[key]:  # labels of whole rows; the longest
            return part
        return torch.nn.functional.pad(part, (0, longest[key] - part.shape[1]), value=fill[key])

    return {
        index: {**one, "tensors": {key: padded(key, part) for key, part in one["tensors"].items()}}
        for index, one in batches.items()
    }

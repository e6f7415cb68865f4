"""One trial under way: its spec, adapter, position in the data, scores and record."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from loralab.adapters.base import Adapter
from loralab.adapters.hooks import mix
from loralab.data.encoding import Encoded
from loralab.errors import DivergedError, LoralabError
from loralab.optim.optimizers import State
from loralab.records.jsonl import MetricsFile, rows
from loralab.records.metric_logger import MetricLogger
from loralab.training.cursor import Batch, DataCursor
from loralab.training.early_stopping import EarlyStopping
from loralab.training.specs import TrialSpec

log = logging.getLogger(__name__)

STOPPED = 130  # the exit code of a trial that was interrupted, for its loggers


@dataclass
class Trial:
    """One run of the experiment, alone on the base or beside others. The fit changes it step by step."""

    spec: TrialSpec
    adapter: Adapter
    data: Encoded
    pad_token_id: int
    record: dict[str, Any]
    step: int = 0  # finished optimizer steps
    tokens: int = 0  # seen in training, padding not counted
    failure: LoralabError | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    loggers: list[MetricLogger] = field(default_factory=list)
    last_validated_step: int = -1
    last_logged_step: int = -1  # rows up to it are in metrics.jsonl already
    train_seconds: float = 0.0  # of all its fits
    untimed_tokens: int = 0  # of steps that no timing counts
    predictions: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # {split: its generated rows}
    updating: bool = False  # the optimizer has begun to change the parameters and has not ended
    optimizer_state: State = field(default_factory=dict)  # on the host, between fits; empty before the first step

    def __post_init__(self) -> None:
        trainer = self.spec.trainer
        self.early_stopping = EarlyStopping(trainer.patience, self.spec.metric_mode)
        sizes = (self.spec.data.batch_size, trainer.accumulate_grad_batches)
        self.data_cursor = DataCursor(
            self.data, self.task, self.pad_token_id, self.spec.seed, *sizes, self.spec.packing_length
        )
        self._reset_cursor()

    def _reset_cursor(self) -> None:
        """Moves the data cursor to the end of the last finished step."""
        self.data_cursor.seek(self.step)
        self._finished_tokens = self.tokens

    @property
    def task(self) -> str:
        return self.spec.model.task

    @property
    def max_steps(self) -> int:
        return self.spec.trainer.max_steps

    @property
    def alive(self) -> bool:
        """True if it still trains."""
        return self.failure is None and not self.early_stopping.stopped and self.step < self.max_steps

    def next_batch(self) -> Batch:
        """The first micro-batch of the next step; the cursor does not move."""
        return self.data_cursor.peek(self.step)

    def dropout_key(self, micro: int) -> int:
        """The seed of every dropout mask of one pass of this trial."""
        return mix(self.spec.seed, self.step, micro)

    def certain_steps(self, interval: int) -> int:
        """The step that it reaches at least, with a validation every ``interval`` steps."""
        return self.early_stopping.certain_steps(self.step, interval, self.max_steps)

    def schedule_factor(self, lr: float) -> Callable[[int], float]:
        """The schedule of parameters that begin with the rate ``lr``, as a function of the steps made from here on."""
        factor, start = self.spec.schedule.factor(self.max_steps, lr), self.step
        return lambda done: factor(start + done)

    def finish_step(self) -> None:
        """Counts an optimizer step."""
        self.step += 1
        self._finished_tokens = self.tokens

    def rewind(self, state: State | None) -> bool:
        """Goes back to the end of the last finished step after a fit that ended by an error.

        ``state``: the optimizer's; None where it could not be copied. False where the trial must restart: the update
        was cut short, so that some parameters or moments are a step ahead, or there is no state.
        """
        self.tokens = self._finished_tokens
        self._reset_cursor()
        for parameter in self.adapter.parameters():
            parameter.grad = None
        self.optimizer_state = (state or {}) if self.step else {}
        if not self.alive:
            return True
        return self.is_in_step(state or {}) and (state is not None or not self.step)

    def is_in_step(self, state: State) -> bool:
        """True if an optimizer's state is that of the last finished step, False where an update was cut short."""
        if not self.spec.optimizer.counts_steps:
            return not self.updating
        return all(int(moments.get("step", 0)) <= self.step for moments in state.values())

    def restart(self, adapter: Adapter) -> None:
        """Goes back to the first step with a newly drawn adapter; rows that were logged are not logged again."""
        self.adapter, self.last_logged_step = adapter, max(self.last_logged_step, self.step)
        self.step, self.tokens, self.updating = 0, 0, False
        self.optimizer_state, self.last_validated_step, self.metrics, self.predictions = {}, -1, {}, {}
        self.early_stopping = EarlyStopping(self.spec.trainer.patience, self.spec.metric_mode)
        self._reset_cursor()

    def score(self, values: Mapping[str, float]) -> None:
        """Stores and logs the scores of a split. The trial fails where a loss or its metric is not finite."""
        self.metrics.update(values)
        self.log(values)
        watched = [key for key in values if key.endswith("/loss") or key == self.spec.metric]
        if key := next((key for key in watched if not math.isfinite(values[key])), None):
            advice = (
                f"a lower optimizer.lr (now {self.spec.optimizer.lr:g}), a warm-up or gradient clipping may help"
                if self.step
                else "nothing was trained yet, so the base itself gives it: another model.dtype or trainer.precision,"
                " or other rows may help"
            )
            self.fail(DivergedError(f"{key} is {values[key]:g} after step {self.step}: {advice}"))

    def validated(self, values: Mapping[str, float]) -> None:
        """Stores and logs the scores of a validation, which may end the trial by early stopping."""
        self.score(values)
        self.last_validated_step = self.step
        if self.failure is not None or self.spec.metric not in values:
            return
        stopping = self.early_stopping
        if stopping.score(values[self.spec.metric], self.step) and self.step < self.max_steps:
            log.info(
                "%s ends at step %d: %s has not been better than %.4g in %d validation%s",
                *(self.spec.id, self.step, self.spec.metric, stopping.best, stopping.bad_validations),
                "s" * (stopping.bad_validations > 1),
                extra={"trial": self.spec.id},
            )

    def fail(self, error: LoralabError) -> None:
        """Ends the trial; the others of its pack go on. A first error is not overwritten."""
        self.failure = self.failure or error

    def fail_on_infinite(self, what: str) -> None:
        """Fails the trial: ``what``, the loss or the gradient of the step under way, is not finite."""
        advice = "a lower optimizer.lr, a warm-up or gradient clipping may help"
        lr = self.spec.optimizer.lr
        self.fail(DivergedError(f"{what} is not finite at step {self.step + 1} (lr {lr:g}): {advice}"))

    def fail_on_zero_gradient(self) -> None:
        """Fails the trial: its gradient is exactly zero, so no further step would change it."""
        self.fail(
            DivergedError(
                f"the gradient is exactly zero at step {self.step + 1} while the loss is not (lr"
                f" {self.spec.optimizer.lr:g}): the adapter has saturated the base; try a lower optimizer.lr"
            )
        )

    def log(self, values: Mapping[str, float], under_way: bool = False) -> None:
        """Writes a row at the last finished step, or with ``under_way`` at the one that has begun."""
        step = self.step + (under_way and self.alive)
        if step > self.last_logged_step:
            for logger in self.loggers:
                logger.log(step, values)

    def open_loggers(self, mirror: MetricLogger) -> None:
        """metrics.jsonl in the run folder, and ``mirror``, which is given the rows of an earlier process too."""
        path = self.spec.folder / "metrics.jsonl"
        file = MetricsFile(path, self.step)
        for step, values in rows(path):
            mirror.log(step, values)
        self.loggers = [file, mirror]

    def sync_loggers(self) -> None:
        """Returns when what was logged is on disk."""
        for logger in self.loggers:
            logger.sync()

    def close_loggers(self) -> None:
        interrupted = self.failure is None and self.record["status"] == "running"
        for logger in self.loggers:
            logger.finish(self.failure.exit_code if self.failure else STOPPED if interrupted else 0)
        self.loggers = []

    def state_dict(self) -> dict[str, Any]:
        """The content of a checkpoint; the order of the rows and dropout follow from seed and step."""
        return {
            "step": self.step,
            "tokens": self._finished_tokens,
            "optimizer": self.optimizer_state,
            "early_stopping": self.early_stopping.state_dict(),
            "adapter": self.adapter.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state_dict``. Raises an error, and changes nothing, where something is missing."""
        step, tokens, optimizer = int(state["step"]), int(state["tokens"]), dict(state["optimizer"])
        stopping = replace(self.early_stopping)
        stopping.load_state_dict(state["early_stopping"])
        self.adapter.load_state_dict(state["adapter"], strict=True)  # last, because it changes the adapter in place
        self.early_stopping = stopping
        self.step, self.tokens, self.optimizer_state = step, tokens, optimizer
        self.untimed_tokens = self.tokens  # another process spent the seconds they took
        self._reset_cursor()

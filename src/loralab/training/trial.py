"""One trial under way: its spec, adapter, position in the data, scores and record."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from loralab.adapters.base import Adapter
from loralab.data.base import FORGETTING
from loralab.data.encoding import Encoded, Example
from loralab.errors import DivergedError, LoralabError
from loralab.numerics.hashing import mix
from loralab.optim.optimizers import State
from loralab.records.jsonl import MetricsFile, rows
from loralab.records.metric_logger import MetricLogger
from loralab.training.clock import Clock
from loralab.training.cursor import Batch, DataCursor
from loralab.training.early_stopping import EarlyStopping
from loralab.training.specs import TrialSpec
from loralab.training.together import rank_and_size

log = logging.getLogger(__name__)

STOPPED = 130  # the exit code of a trial that was interrupted, for its loggers


@dataclass
class Best:
    """The state of an adapter, on the host, that had the best metric of the validations so far."""

    step: int
    value: float
    state: dict[str, Tensor]


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
    clock: Clock = field(default_factory=Clock)
    predictions: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # {split: its generated rows}
    updating: bool = False  # the optimizer has begun to change the parameters and has not ended
    counting: bool = False  # a step is being counted: ``step``, the parameters and the rows are not all of one
    optimizer_state: State = field(default_factory=dict)  # on the host, between fits; empty before the first step
    callback_states: dict[str, Any] = field(default_factory=dict)  # {callback: its state_dict} after the last step
    scaler_state: dict[str, Any] = field(default_factory=dict)  # of the loss scaler (16-mixed), which a pack shares
    merges_rows: bool = False  # rows of one step are written as one, once the step is over
    bare_scores: dict[str, float] = field(default_factory=dict)  # of the base without any adapter on data.forgetting
    last: Best | None = None  # the last state, where the adapter was set back to the best one
    best: Best | None = None  # of the validations so far, where trainer.keep_best

    def __post_init__(self) -> None:
        trainer = self.spec.trainer
        self._held: tuple[int, dict[str, Any]] = (0, {})  # the row of a step that may still grow
        self._begin_stopping()
        sizes = (self.spec.data.batch_size, trainer.accumulate_grad_batches)
        self.data_cursor = DataCursor(
            self.data,
            *(self.task, self.pad_token_id, self.spec.seed, *sizes, self.spec.packing_length, rank_and_size()),
        )
        self._reset_cursor()

    def _begin_stopping(self) -> None:
        spec = self.spec
        self.early_stopping = EarlyStopping(spec.trainer.patience, spec.metric_mode, metric=spec.metric)
        self.stops = [self.early_stopping, *(rule.begin() for rule in spec.stops)]

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
    def end(self) -> int:
        """The step after which this run trains no further: max_steps, or that at which trainer.until pauses it."""
        until = self.spec.trainer.until
        return self.max_steps if until is None else min(self.max_steps, max(1, round(until * self.max_steps)))

    @property
    def alive(self) -> bool:
        """True if it still trains."""
        return self.failure is None and self.stopped_by is None and self.step < self.end

    @property
    def paused(self) -> bool:
        """True if a later run goes on from here."""
        return self.failure is None and self.stopped_by is None and self.end <= self.step < self.max_steps

    @property
    def stopped_by(self) -> EarlyStopping | None:
        """The rule that ends the trial early; not before trainer.min_steps."""
        if self.step < self.spec.trainer.decisive.get("min_steps", 0):
            return None
        return next((rule for rule in self.stops if rule.stopped), None)

    def evaluated(self, split: str) -> tuple[Sequence[Example], int]:
        """The rows of ``split`` and how many of them are scored in a batch; none where the trial has no such rows."""
        data = self.spec.data.forgetting if split == FORGETTING else self.spec.data
        return self.data[split], data.batch_size if data is not None else 1

    def next_batch(self) -> Batch:
        """The first micro-batch of the next step; the cursor does not move."""
        return self.data_cursor.peek(self.step)

    def dropout_key(self, micro: int) -> int:
        """The seed of every dropout mask of one pass of this trial."""
        return mix(self.spec.seed, self.step, micro)

    def certain_steps(self, interval: int) -> int:
        """The step that it reaches at least, with a validation every ``interval`` steps."""
        return min(rule.certain_steps(self.step, interval, self.end) for rule in self.stops)

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
        """True if an optimizer's state is that of the last finished step, False where an update was cut short, or the
        counting of its step."""
        if self.counting:
            return False
        if not self.spec.optimizer.counts_steps:
            return not self.updating
        return all(int(moments.get("step", 0)) <= self.step for moments in state.values())

    def restart(self, adapter: Adapter) -> None:
        """Goes back to the first step with a newly drawn adapter; rows that were logged are not logged again."""
        self.adapter, self.last_logged_step = adapter, max(self.last_logged_step, self.step)
        self.step, self.tokens, self.updating, self.counting = 0, 0, False, False
        self.optimizer_state, self.last_validated_step, self.metrics, self.predictions = {}, -1, {}, {}
        self.best, self.last, self.callback_states, self._held = None, None, {}, (0, {})
        self._begin_stopping()
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
        if self.failure is not None:
            return
        if self.spec.trainer.keep_best and self.spec.metric in values:
            self._keep_best(values[self.spec.metric])
        for rule in self.stops:
            if rule.metric in values and rule.score(values[rule.metric], self.step) and self.step < self.max_steps:
                self._log_end(rule, values[rule.metric])

    def _log_end(self, rule: EarlyStopping, value: float) -> None:
        if rule.ended:
            text = f"{rule.metric} is {value:.4g}"
        else:
            count = f"{rule.bad_validations} validation{'s' * (rule.bad_validations > 1)}"
            by = f" by more than min_delta = {rule.min_delta:g}" if rule.min_delta else ""
            text = f"{rule.metric} has not been better than {rule.best:.4g}{by} in {count}"
        log.info("%s ends at step %d: %s", self.spec.id, self.step, text, extra={"trial": self.spec.id})

    def _keep_best(self, value: float) -> None:
        """Keeps the present state where its metric is better than that of every validation before."""
        if self.best is not None:
            before = self.best.value
            if self.best.step == self.step or not (
                value < before if self.spec.metric_mode == "min" else value > before
            ):
                return
        self.best = Best(self.step, value, self._state())

    def _state(self) -> dict[str, Tensor]:
        """A copy of the adapter's state on the host."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.adapter.state_dict().items()}

    def take_best(self) -> None:
        """Sets the adapter to the best state, where it is kept; the last one is then ``self.last``."""
        if self.best is None or self.failure is not None or self.best.step == self.step:
            return
        if self.last is None:  # else an earlier fit has done it
            self.last = Best(self.step, self.metrics[self.spec.metric], self._state())
        self.adapter.load_state_dict(self.best.state, strict=True)

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
        why = "the adapter has saturated the base; try a lower optimizer.lr"
        if not self.step:  # no step was made, so that no learning rate has done it
            why = "as the adapter begins, nothing that it trains moves the loss (two factors of a product both 0, say)"
        lr = self.spec.optimizer.lr
        self.fail(
            DivergedError(
                f"the gradient is exactly zero at step {self.step + 1} while the loss is not (lr {lr:g}): {why}"
            )
        )

    def log(self, values: Mapping[str, Any], under_way: bool = False) -> None:
        """Writes a row at the last finished step, or with ``under_way`` at the one that has begun."""
        step = self.step + (under_way and self.alive)
        if step <= self.last_logged_step:
            return
        if not self.merges_rows:
            self._write(step, values)
            return
        if step != self._held[0]:
            self.write_held()
        self._held = step, {**self._held[1], **values}

    def write_held(self) -> None:
        """Writes the row that was held back for more values of its step."""
        (step, values), self._held = self._held, (0, {})
        if values:
            self._write(step, values)

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        for logger in self.loggers:
            logger.log(step, values)

    def open_loggers(self, mirror: MetricLogger) -> None:
        """metrics.jsonl in the run folder, and ``mirror``, which is given the rows of an earlier process where it
        ``replays`` them."""
        path = self.spec.folder / "metrics.jsonl"
        again = ("pause/",) if self.paused else ("val/", "test/")  # scores of this very step
        self.loggers = [MetricsFile(path, self.step, again), mirror]
        mirrors = [one for one in getattr(mirror, "loggers", [mirror]) if getattr(one, "replays", False)]
        for step, values in rows(path) if mirrors else ():
            for one in mirrors:
                one.log(step, values)

    def sync_loggers(self) -> None:
        """Returns when what was logged is on disk."""
        self.write_held()
        for logger in self.loggers:
            logger.sync()

    def close_loggers(self) -> None:
        interrupted = self.failure is None and self.record["status"] == "running"
        code = self.failure.exit_code if self.failure else STOPPED if interrupted else 0
        with ExitStack() as closing:  # each is closed, whatever another raises
            for logger in reversed(self.loggers):
                closing.callback(logger.finish, code)
            self.write_held()
        self.loggers = []

    def state_dict(self) -> dict[str, Any]:
        """The content of a checkpoint; the order of the rows and dropout follow from seed and step."""
        return {
            "step": self.step,
            "tokens": self._finished_tokens,
            "time": self.clock.state_dict(),
            "optimizer": self.optimizer_state,
            "early_stopping": self.early_stopping.state_dict(),
            "stops": [rule.state_dict() for rule in self.stops[1:]],
            "callbacks": self.callback_states,
            "scaler": self.scaler_state,
            "best": vars(self.best) if self.best is not None else None,
            "adapter": {name: _own(tensor) for name, tensor in self.adapter.state_dict().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state_dict``. Raises an error, and changes nothing, where something is missing."""
        step, tokens, optimizer = int(state["step"]), int(state["tokens"]), dict(state["optimizer"])
        stops = [rule.begin() for rule in self.stops]
        for rule, stored in zip(stops, [state["early_stopping"], *state.get("stops", [])], strict=True):
            rule.load_state_dict(stored)
        best = Best(**kept) if (kept := state.get("best")) else None
        callbacks = dict(state.get("callbacks", {}))
        self.adapter.load_state_dict(state["adapter"], strict=True)  # last, because it changes the adapter in place
        self.early_stopping, self.stops, self.best, self.callback_states = stops[0], stops, best, callbacks
        self.step, self.tokens, self.optimizer_state = step, tokens, optimizer
        self.scaler_state = dict(state.get("scaler", {}))
        self.clock.load_state_dict(state.get("time", {}), tokens)
        self._reset_cursor()


def _own(tensor: Tensor) -> Tensor:
    """``tensor``; a copy where it is a view of more, as of the parameters of a pack: a file would hold them all."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()

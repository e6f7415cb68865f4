"""When a trial ends before its last step: a metric has not been better for ``patience`` validations."""

import math
from dataclasses import dataclass, replace
from typing import Any, Self


@dataclass
class EarlyStopping:
    """What the validations of one trial have given. ``patience`` None: the trial never ends early.

    The fields from ``min_delta`` on are those of Lightning's callback of this name, and decide as it does.
    """

    patience: int | None
    mode: str = "min"  # max: a higher metric is better
    best: float | None = None
    bad_validations: int = 0  # since the best one
    last_scored_step: int = -1
    ended: bool = False  # by a threshold, or by a metric that is not finite
    min_delta: float = 0.0  # a metric is better by more than this
    stopping_threshold: float | None = None  # better than this: enough
    divergence_threshold: float | None = None  # worse than this: lost
    check_finite: bool = False  # ends where the metric is not finite
    metric: str = "val/loss"

    def begin(self) -> Self:
        """The same rule for a trial that has not been validated."""
        return replace(self, best=None, bad_validations=0, last_scored_step=-1, ended=False)

    @property
    def stopped(self) -> bool:
        return self.ended or (self.patience is not None and self.bad_validations >= self.patience)

    def score(self, value: float, step: int) -> bool:
        """True if the metric of this validation, at ``step``, ends the trial.

        A step that was scored before the run was continued is not counted again.
        """
        if self.last_scored_step == step:
            return False
        self.last_scored_step = step
        if self._is_decided(value):
            self.ended = True
            return True
        if self.best is None or math.isnan(self.best) or self._better(value, self.best, self.min_delta):
            self.best, self.bad_validations = value, 0
            return False
        self.bad_validations += 1
        return self.bad_validations == self.patience

    def _is_decided(self, value: float) -> bool:
        """Whether this one value ends the trial, whatever came before."""
        if self.check_finite and not math.isfinite(value):
            return True
        enough, lost = self.stopping_threshold, self.divergence_threshold
        if enough is not None and self._better(value, enough):
            return True
        return lost is not None and self._better(-value, -lost)

    def _better(self, value: float, than: float, by: float = 0.0) -> bool:
        return value + by < than if self.mode == "min" else value - by > than

    def certain_steps(self, step: int, interval: int, max_steps: int) -> int:
        """The step that a trial at ``step`` reaches at least, with a validation every ``interval`` steps."""
        if self.patience is None or not interval:
            return max_steps
        left = self.patience + 1 if self.best is None else self.patience - self.bad_validations
        if self.stopping_threshold is not None or self.divergence_threshold is not None:
            left = 1
        return min(max_steps, (step // interval + left) * interval)

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self.best,
            "bad_validations": self.bad_validations,
            "last_scored_step": self.last_scored_step,
            "ended": self.ended,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        best, bad, last = state["best"], int(state["bad_validations"]), int(state["last_scored_step"])
        self.best, self.bad_validations, self.last_scored_step = best, bad, last
        self.ended = bool(state.get("ended", False))

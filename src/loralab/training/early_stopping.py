"""When a trial ends before its last step: its metric has not been better for ``patience`` validations."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass
class EarlyStopping:
    """What the validations of one trial have given. ``patience`` None: the trial never ends early."""

    patience: int | None
    mode: str = "min"  # max: a higher metric is better
    best: float | None = None
    bad_validations: int = 0  # since the best one
    last_scored_step: int = -1

    @property
    def stopped(self) -> bool:
        return self.patience is not None and self.bad_validations >= self.patience

    def score(self, value: float, step: int) -> bool:
        """True if the metric of this validation, at ``step``, ends the trial.

        A step that was scored before the run was continued is not counted again.
        """
        if self.last_scored_step == step:
            return False
        self.last_scored_step = step
        if self.best is None or math.isnan(self.best) or self._better(value):
            self.best, self.bad_validations = value, 0
            return False
        self.bad_validations += 1
        return self.bad_validations == self.patience

    def _better(self, value: float) -> bool:
        assert self.best is not None
        return value < self.best if self.mode == "min" else value > self.best

    def certain_steps(self, step: int, interval: int, max_steps: int) -> int:
        """The step that a trial at ``step`` reaches at least, with a validation every ``interval`` steps."""
        if self.patience is None or not interval:
            return max_steps
        left = self.patience + 1 if self.best is None else self.patience - self.bad_validations
        return min(max_steps, (step // interval + left) * interval)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "bad_validations": self.bad_validations, "last_scored_step": self.last_scored_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        best, bad, last = state["best"], int(state["bad_validations"]), int(state["last_scored_step"])
        self.best, self.bad_validations, self.last_scored_step = best, bad, last

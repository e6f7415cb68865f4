"""When a trial ends before its last step: its metric has not been better for ``patience`` validations."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass
class EarlyStopping:
    """The validations of one trial, as far as they decide its end. ``patience`` None: it never ends early."""

    patience: int | None
    mode: str = "min"  # max: a higher metric is better
    best: float | None = None
    bad_validations: int = 0  # since the best one
    last_scored_step: int = -1

    @property
    def stopped(self) -> bool:
        return self.patience is not None and self.bad_validations >= self.patience

    def score(self, value: float, step: int) -> bool:
        """Takes the metric of a validation at ``step``; whether it is the one that ends the trial.

        A validation that was scored before the run was continued changes nothing.
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
        """The step that a trial at ``step`` reaches whatever its validations, one every ``interval`` steps, give."""
        if self.patience is None or not interval:
            return max_steps
        left = self.patience + 1 if self.best is None else self.patience - self.bad_validations
        return min(max_steps, (step // interval + left) * interval)

    def reset(self) -> None:
        """Forgets every validation."""
        self.best, self.bad_validations, self.last_scored_step = None, 0, -1

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "bad_validations": self.bad_validations, "last_scored_step": self.last_scored_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        best, bad, last = state["best"], int(state["bad_validations"]), int(state["last_scored_step"])
        self.best, self.bad_validations, self.last_scored_step = best, bad, last

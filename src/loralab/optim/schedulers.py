"""Schedules that are no specs of loralab's: torch's schedulers, and functions step -> factor of the learning rate."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from loralab.errors import ConfigError
from loralab.optim.targets import checked, imported, path_of, refused
from loralab.spec import spec


def schedule_of(target: Any, values: Mapping[str, Any], key: str = "schedule") -> "AnySchedule":
    """The spec of one of torch's schedulers, or of a function step -> factor of the learning rate.

    A function is given the steps made so far, from 0, and ``max_steps`` where it has that argument. Raises ConfigError
    that begins with ``key``.
    """
    if target is ReduceLROnPlateau or (isinstance(target, type) and issubclass(target, ReduceLROnPlateau)):
        raise ConfigError(
            f"{key}: {target.__name__} lowers the rate by a validation's score, and a trial's rate is a function of its"
            " steps alone, the same in a pack and after a resume; valid: another of torch.optim.lr_scheduler, or"
            " trainer.patience, which ends a trial by its score"
        )
    scheduler = isinstance(target, type) and issubclass(target, LRScheduler)
    if not scheduler and (isinstance(target, type) or not callable(target)):
        raise ConfigError(
            f"{key}._target_={path_of(target)} is no schedule; valid: a class of torch.optim.lr_scheduler, or a"
            " function step -> factor"
        )
    return AnySchedule(target=path_of(target), arguments=checked(target, values, key, skip=1))


@spec("schedule")
class AnySchedule:
    """A scheduler class of torch's, or a function (``target``, imported), and its arguments but for defaults."""

    target: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def cls(self) -> Any:
        return imported(self.target)

    def factor(self, max_steps: int, lr: float) -> Callable[[int], float]:
        """A function: step (from 0) -> factor of ``lr``, the rate that the schedule begins from."""
        if not isinstance(self.cls, type):
            own = dict(self.arguments)
            if "max_steps" in inspect.signature(self.cls).parameters:
                own.setdefault("max_steps", max_steps)
            return lambda step: self.cls(step, **own)
        rates = _Rates(self, lr)
        return lambda step: rates.at(step) / lr

    def check(self, max_steps: int, lr: float, last: int | None = None) -> None:
        """Raises ConfigError where a step of the run, up to ``last`` (None: all of them), has no rate: no number, below
        0 or infinite."""
        try:
            factor = self.factor(max_steps, lr)
            found = [float(factor(step)) for step in range((max_steps if last is None else last) + 1)]
        except Exception as error:  # of a class of anybody's
            raise refused(self.cls, "schedule", error) from error
        for step, value in enumerate(found):
            if not 0 <= value < math.inf:
                raise ConfigError(
                    f"schedule: {self.cls.__name__} gives lr times {value:g} at step {step}; valid: at least 0"
                )


class _Rates:
    """The rates of a scheduler of torch's, which steps a stand-in that has a learning rate and nothing else."""

    def __init__(self, schedule: AnySchedule, lr: float) -> None:
        self.stand_in = _OnlyRate([{"params": [nn.Parameter(torch.zeros(()))], "lr": lr}], {})
        self.scheduler = schedule.cls(self.stand_in, **schedule.arguments)
        self.found = [self._now()]

    def _now(self) -> float:
        return float(self.stand_in.param_groups[0]["lr"])

    def at(self, step: int) -> float:
        while len(self.found) <= step:
            self.stand_in.step()
            self.scheduler.step()
            self.found.append(self._now())
        return self.found[step]


class _OnlyRate(torch.optim.Optimizer):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing."""

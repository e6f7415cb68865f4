"""Optimizer and schedule classes that are no specs of loralab's: torch's, those of other packages, the user's own."""

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import Annotated, Any

import torch
from annotated_types import Le
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils._pytree import tree_leaves

from loralab.errors import ConfigError, nearest
from loralab.optim.groups import split_groups
from loralab.spec import Positive, make, spec

SIDES = (16, 8)  # of the matrices that an optimizer is tried on: two trials of two
STEPS = 3
LR = Annotated[Positive, Le(1e30), "a positive number of at most 1e30"]


def optimizer_of(cls: Any, values: Mapping[str, Any], key: str = "optimizer") -> "AnyOptimizer":
    """The spec of an optimizer class with ``values``, its own arguments and ``lr_ratio``; tried on small matrices.

    Raises ConfigError that begins with ``key`` where ``cls`` is no optimizer, an argument is wrong or one is missing,
    or where it cannot be stepped as any other.
    """
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise ConfigError(
            f"{key}._target_={_path(cls)} is no optimizer; valid: a class derived from torch.optim.Optimizer, or a spec"
            " of loralab's such as loralab.optim.optimizers.AdamW"
        )
    own = {name: value for name, value in values.items() if name != "lr_ratio"}
    arguments = _checked(cls, own, key, skip=1, others=("lr_ratio",))
    lr = own.get("lr", _defaults(cls, 1).get("lr"))
    if lr is None:
        raise ConfigError(f"{key}: {cls.__name__} has no argument lr, which schedule and record need")
    given = {"target": _path(cls), "arguments": arguments, "lr": lr, "lr_ratio": values.get("lr_ratio", 1.0)}
    made = make(AnyOptimizer, given, key)
    _try(made, key)
    return made


@spec("optimizer")
class AnyOptimizer:
    """An optimizer class (``target``, imported) and its arguments but for those that are its defaults; ``lr`` too."""

    target: str
    lr: LR
    arguments: dict[str, Any] = field(default_factory=dict)
    lr_ratio: Positive = 1.0  # as AdamW's

    flat = False
    counts_steps = False  # whether a state says in which step it was made

    @property
    def cls(self) -> Any:
        return _imported(self.target)

    @property
    def name(self) -> str:
        return self.target

    def unpaged(self) -> "AnyOptimizer":
        """The same: nothing pages it."""
        return self

    @property
    def memory_key(self) -> tuple[Any, ...]:
        """Equal for optimizers with as much state."""
        return (self.name, self.lr_ratio, repr(self.arguments))

    @cached_property
    def _tried(self) -> "_Tried":
        with torch.random.fork_rng(devices=[]):
            return _Tried.of(self)

    def check_traceable(self) -> None:
        """Raises ConfigError where it cannot be stepped without values, by which its memory is predicted."""
        from torch._subclasses.fake_tensor import FakeTensorMode  # slow to import

        try:
            with FakeTensorMode():
                _step(self.cls([{"params": (pair := _matrices(0))}], **self.arguments), [pair])
        except Exception as error:  # of a class of anybody's
            text = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"optimizer {self.name} cannot be stepped without values, so its memory is not predicted ({text});"
                " valid: a step that reads no value of a tensor, or plan.record=false"
            ) from error

    @property
    def pack_key(self) -> tuple[Any, ...]:
        """Equal for trials that one optimizer may serve. All differ in ``lr`` alone, those of torch's own classes also
        in what is a setting of a group; another class may read the rest from the optimizer itself."""
        own = self._tried.settings if self.target.startswith("torch.optim.") else {"lr"}
        whole = {name: value for name, value in self.arguments.items() if name not in own}
        return (self.target, repr(whole))

    @property
    def why_alone(self) -> str:
        """Why its trials share no pass; empty where they may."""
        if self._tried.separate:
            return ""
        return f"optimizer {self.name} keeps state beside that of its parameters, or mixes its groups"

    def groups(self, named: Iterable[tuple[str, nn.Parameter]], trial: int = 0) -> list[dict[str, Any]]:
        """As AdamW's: a group, or with ``lr_ratio`` two. Raises ConfigError."""
        return split_groups(self, named, trial)

    def group(self, parameters: list[nn.Parameter]) -> dict[str, Any]:
        """A parameter group with all its settings: what it lacks it would have from the pack's first trial."""
        return {**self._tried.settings, "params": parameters, "lr": self.lr}

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """One optimizer over the groups of all trials of a pack. Raises ConfigError where it refuses them."""
        try:
            optimizer: torch.optim.Optimizer = self.cls(groups, **self.arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            raise _refused(self.cls, "optimizer", error) from error
        return optimizer

    def state_bytes(self, count: int, width: int) -> int:
        """About the bytes of state of ``count`` parameters of ``width`` bytes, from those of small matrices."""
        return round(self._tried.bytes_each * count * width / 4)


@dataclass(frozen=True)
class _Tried:
    """What stepping small matrices has shown: the settings of a group, state bytes of a float32 parameter, and whether
    trials are ``separate``: each moves in one optimizer to the bit as it moves alone, and all state is by parameter."""

    settings: dict[str, Any]
    bytes_each: float
    separate: bool
    paged: bool

    @classmethod
    def of(cls, made: AnyOptimizer) -> "_Tried":
        pairs = [_matrices(trial) for trial in range(2)]
        groups = [{"params": pair, "lr": made.lr * (1 + trial)} for trial, pair in enumerate(pairs)]
        together = made.cls(groups, **made.arguments)
        group = made.cls(_matrices(0), **made.arguments).param_groups[0]
        settings = {key: value for key, value in group.items() if key != "params"}
        alone = []
        for trial in range(2):
            pair = _matrices(trial)
            _step(made.cls([{"params": pair, "lr": made.lr * (1 + trial)}], **made.arguments), [pair])
            alone.append(pair)
        _step(together, pairs)
        same = all(
            torch.equal(a, b)
            for ours, others in zip(pairs, alone, strict=True)
            for a, b in zip(ours, others, strict=True)
        )
        parameters = {id(matrix) for pair in pairs for matrix in pair}
        by_parameter = all(id(owner) in parameters for owner in together.state)
        held = sum(leaf.nbytes for leaf in tensors(together.state.values()))
        each = held / sum(matrix.numel() for pair in pairs for matrix in pair)
        return cls(settings, each, same and by_parameter, bool(getattr(together, "is_paged", False)))


def tensors(states: Iterable[Mapping[str, Any]]) -> list[torch.Tensor]:
    """The tensors of optimizer states, however nested, without the counter of steps."""
    values = [{key: value for key, value in state.items() if key != "step"} for state in states]
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _matrices(trial: int) -> list[nn.Parameter]:
    drawn = torch.Generator().manual_seed(trial)
    shapes = (SIDES, SIDES[::-1])
    return [nn.Parameter(torch.randn(shape, generator=drawn)) for shape in shapes]


def _step(optimizer: torch.optim.Optimizer, pairs: list[list[nn.Parameter]]) -> None:
    for number in range(STEPS):
        for pair in pairs:
            for place, parameter in enumerate(pair):
                drawn = torch.Generator().manual_seed(10 * number + place)
                parameter.grad = torch.randn(parameter.shape, generator=drawn)
        optimizer.step()


def _try(made: AnyOptimizer, key: str) -> None:
    """Raises ConfigError where small matrices cannot be stepped."""
    name = made.cls.__name__
    step = inspect.signature(made.cls.step).parameters
    if any(one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD for one in [*step.values()][1:]):
        raise ConfigError(
            f"{key}: {name}.step needs a closure, which it calls several times a step; valid: an optimizer that steps"
            " once for each gradient"
        )
    try:
        tried = made._tried
    except Exception as error:  # of a class of anybody's
        raise _refused(made.cls, key, error) from error
    if tried.paged:
        raise ConfigError(
            f"{key}: {name} keeps its state in paged memory, whose bytes are counted for loralab's own alone; valid:"
            " optimizer=paged_adamw or paged_adamw_8bit, or a class that pages nothing"
        )
    if "lr" not in tried.settings:
        raise ConfigError(f"{key}: {name} has no lr in its parameter groups, which schedule and record need")


def _refused(cls: Any, key: str, error: Exception) -> ConfigError:
    text = " ".join(str(error).split())[:300] or type(error).__name__
    return ConfigError(f"{key}: {cls.__name__} refuses its options: {text}")


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
            f"{key}._target_={_path(target)} is no schedule; valid: a class of torch.optim.lr_scheduler, or a function"
            " step -> factor"
        )
    return AnySchedule(target=_path(target), arguments=_checked(target, values, key, skip=1))


@spec("schedule")
class AnySchedule:
    """A scheduler class of torch's, or a function (``target``, imported), and its arguments but for defaults."""

    target: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def cls(self) -> Any:
        return _imported(self.target)

    def factor(self, max_steps: int, lr: float) -> Callable[[int], float]:
        """A function: step (from 0) -> factor of ``lr``, the rate that the schedule begins from."""
        if not isinstance(self.cls, type):
            own = dict(self.arguments)
            if "max_steps" in inspect.signature(self.cls).parameters:
                own.setdefault("max_steps", max_steps)
            return lambda step: self.cls(step, **own)
        rates = _Rates(self, lr)
        return lambda step: rates.at(step) / lr

    def check(self, max_steps: int, lr: float) -> None:
        """Raises ConfigError where a step of the run has no rate: no number, below 0 or infinite."""
        try:
            factor = self.factor(max_steps, lr)
            found = [float(factor(step)) for step in range(max_steps + 1)]
        except Exception as error:  # of a class of anybody's
            raise _refused(self.cls, "schedule", error) from error
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


def _path(cls: Any) -> str:
    module, name = getattr(cls, "__module__", ""), getattr(cls, "__qualname__", "")
    return f"{module}.{name}" if name else repr(cls)


def _imported(path: str) -> Any:
    """What ``_path`` names, in a module that has been imported."""
    module = next(name for name in _beginnings(path) if name in sys.modules)
    return attrgetter(path.removeprefix(f"{module}."))(sys.modules[module])


def _beginnings(path: str) -> Iterator[str]:
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _parameters(cls: Any, skip: int) -> dict[str, inspect.Parameter]:
    """The arguments of a class or function behind the first ``skip``; of a class's ``__init__`` self is none."""
    return dict([*inspect.signature(cls).parameters.items()][skip:])


def _defaults(cls: Any, skip: int) -> dict[str, Any]:
    return {name: one.default for name, one in _parameters(cls, skip).items() if one.default is not one.empty}


def _checked(cls: Any, values: Mapping[str, Any], key: str, skip: int, others: tuple[str, ...] = ()) -> dict[str, Any]:
    """``values`` but for those that are defaults. Raises ConfigError for an unknown name, or where one is missing."""
    parameters = _parameters(cls, skip)
    named = {name for name, one in parameters.items() if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
    if not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        for name in values:
            if name not in named:
                valid = nearest(name, {*named, *others}) if named or others else "it has none"
                raise ConfigError(f"{key}.{name} is not an option of {cls.__name__}; {valid}")
    for name in named:
        if parameters[name].default is inspect.Parameter.empty and name not in values and name != "max_steps":
            raise ConfigError(f"{key}.{name} is missing, which {cls.__name__} needs; +{key}.{name}=VALUE sets it")
    usual = _defaults(cls, skip)
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return {name: value for name, value in plain.items() if name not in usual or not _equal(value, usual[name])}


def _equal(value: Any, default: Any) -> bool:
    return type(value) is type(default) and value == default if isinstance(value, bool) else bool(value == default)

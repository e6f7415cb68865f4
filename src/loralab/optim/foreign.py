"""Optimizer classes that are no specs of loralab's: torch's, those of other packages, the user's own."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

import torch
from annotated_types import Le
from torch import nn
from torch.utils._pytree import tree_leaves

from loralab.errors import ConfigError
from loralab.optim.groups import split_groups
from loralab.optim.targets import checked, defaults, imported, path_of, refused
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
            f"{key}._target_={path_of(cls)} is no optimizer; valid: a class derived from torch.optim.Optimizer, or a"
            " spec of loralab's such as loralab.optim.optimizers.AdamW"
        )
    own = {name: value for name, value in values.items() if name != "lr_ratio"}
    arguments = checked(cls, own, key, skip=1, others=("lr_ratio",))
    lr = own.get("lr", defaults(cls, 1).get("lr"))
    if lr is None:
        raise ConfigError(f"{key}: {cls.__name__} has no argument lr, which schedule and record need")
    given = {"target": path_of(cls), "arguments": arguments, "lr": lr, "lr_ratio": values.get("lr_ratio", 1.0)}
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
        return imported(self.target)

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
        return (
            f"optimizer {self.name} keeps state beside that of its parameters, mixes its groups, or needs all gradients"
        )

    def groups(self, named: Iterable[tuple[str, nn.Parameter]], trial: int = 0) -> list[dict[str, Any]]:
        """As AdamW's: a group, or with ``lr_ratio`` two. Raises ConfigError."""
        return split_groups(self, named, trial)

    def group(self, parameters: list[nn.Parameter]) -> dict[str, Any]:
        """A parameter group with all its settings: what it lacks it would have from the pack's first trial."""
        return {**self._tried.settings, "params": parameters, "lr": self.lr}

    def build(self, groups: list[dict[str, Any]], scaled: bool = False) -> torch.optim.Optimizer:
        """One optimizer over the groups of all trials of a pack, the same under a loss scaler (``scaled``). Raises
        ConfigError where it refuses them."""
        try:
            optimizer: torch.optim.Optimizer = self.cls(groups, **self.arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            raise refused(self.cls, "optimizer", error) from error
        return optimizer

    def state_bytes(self, count: int, width: int) -> int:
        """About the bytes of state of ``count`` parameters of ``width`` bytes, from those of small matrices."""
        return round(self._tried.bytes_each * count * width / 4)


@dataclass(frozen=True)
class _Tried:
    """What stepping small matrices has shown: the settings of a group, state bytes of a float32 parameter, and whether
    trials are ``separate``: each moves in one optimizer to the bit as it moves alone, all state is by parameter, and
    what has no gradient is left alone."""

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
        separate = same and by_parameter and _leaves_out(together, pairs[0])
        each = held / sum(matrix.numel() for pair in pairs for matrix in pair)
        return cls(settings, each, separate, bool(getattr(together, "is_paged", False)))


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


def _leaves_out(optimizer: torch.optim.Optimizer, pair: list[nn.Parameter]) -> bool:
    """Whether a step leaves alone what has no gradient, as a trial that has left its pack."""
    before = [matrix.detach().clone() for matrix in pair]
    for matrix in pair:
        matrix.grad = None
    try:
        optimizer.step()
    except Exception:  # of a class of anybody's
        return False
    return all(map(torch.equal, before, pair))


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
        raise refused(made.cls, key, error) from error
    if tried.paged:
        raise ConfigError(
            f"{key}: {name} keeps its state in paged memory, whose bytes are counted for loralab's own alone; valid:"
            " optimizer=paged_adamw or paged_adamw_8bit, or a class that pages nothing"
        )
    if "lr" not in tried.settings:
        raise ConfigError(f"{key}: {name} has no lr in its parameter groups, which schedule and record need")

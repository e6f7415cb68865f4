"""Specs around third-party optimizers and the learning-rate schedules: the bare classes accept nonsense."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from loralab.errors import ConfigError, nearest

TORCH = "adamw"
BITSANDBYTES = {
    "adamw_32bit": "AdamW32bit",
    "adamw_8bit": "AdamW8bit",
    "paged_adamw": "PagedAdamW32bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
}
MAX_LR = 1e30  # beyond, a step size overflows float32 inside torch, which would end the whole pack
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class AdamW:
    """Decoupled weight decay Adam (arXiv:1711.05101): torch's, or one of bitsandbytes' by ``name``."""

    name: str = TORCH
    lr: float = 1e-3
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8

    def __post_init__(self) -> None:
        names = (TORCH, *BITSANDBYTES)
        if self.name not in names:
            raise ConfigError(f"optimizer.name={self.name!r} is unknown; {nearest(self.name, names)}")
        if not 0 < self.lr <= MAX_LR:
            raise ConfigError(f"optimizer.lr must be a positive number of at most {MAX_LR:g}, got {self.lr}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ConfigError(f"optimizer.weight_decay must be at least 0, got {self.weight_decay}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas must be two numbers in [0, 1), got {list(self.betas)}")
        if not self.eps > 0:
            raise ConfigError(f"optimizer.eps must be positive, got {self.eps}")

    def group(self, parameters: list[torch.nn.Parameter]) -> dict[str, Any]:
        """A parameter group with this spec's hyper-parameters."""
        return {
            "params": parameters,
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "betas": tuple(self.betas),
            "eps": self.eps,
        }

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """One optimizer over the groups of all trials of a pack."""
        if self.name == TORCH:
            return torch.optim.AdamW(groups)
        return getattr(_bitsandbytes().optim, BITSANDBYTES[self.name])(groups)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Schedule:
    """Learning rate over optimizer steps: linear warm-up, then constant, linear or cosine decay to zero."""

    kind: str = "constant"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ConfigError(f"schedule.kind={self.kind!r} is unknown; {nearest(self.kind, SCHEDULES)}")
        if self.warmup_steps < 0:
            raise ConfigError(f"schedule.warmup_steps must be at least 0, got {self.warmup_steps}")
        if not 0.0 <= self.warmup_ratio < 1.0:
            raise ConfigError(f"schedule.warmup_ratio must lie in [0, 1), got {self.warmup_ratio}")
        if self.warmup_steps and self.warmup_ratio:
            raise ConfigError("schedule.warmup_steps and schedule.warmup_ratio exclude each other: set one")

    def factor(self, max_steps: int) -> Callable[[int], float]:
        """step (0-based) -> share of lr. Step 0 of a warm-up of w steps runs at 1/w, so no step is lost at zero."""
        warmup = self.warmup_steps or math.ceil(self.warmup_ratio * max_steps)

        def at(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            progress = min(1.0, (step - warmup) / max(1, max_steps - warmup))
            if self.kind == "linear":
                return 1.0 - progress
            if self.kind == "cosine":
                return 0.5 * (1.0 + math.cos(math.pi * progress))
            return 1.0

        return at


def describe(optimizer: torch.optim.Optimizer, name: str) -> dict[str, Any]:
    """The ``optimizer`` part of a record: bytes of state, of them in 8 bits and really paged.

    bitsandbytes pages no tensor under 100,000 elements and none on a CPU; both are counted as they are, from the
    ``is_paged`` mark of each state tensor.
    """
    states = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.numel() > 1
    ]
    size = sum(value.numel() * value.element_size() for value in states)
    eight = sum(value.numel() for value in states if value.dtype == torch.uint8)
    paged = sum(value.numel() * value.element_size() for value in states if getattr(value, "is_paged", False))
    effective = name if paged or not name.startswith("paged_") else name.removeprefix("paged_")
    return {
        "name": name,
        "effective_name": "adamw_32bit" if effective == "adamw" and name != "adamw" else effective,
        "state_bytes": size,
        "eight_bit_bytes": eight,
        "paged_bytes": paged,
        "paged_fraction": paged / size if size else 0.0,
    }


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError(
            f"optimizer: bitsandbytes is missing or broken ({error}); pip install bitsandbytes, or optimizer=adamw"
        ) from error
    return bitsandbytes

"""Adapters moved from their start for a moment: one that begins as the base can be told apart from it only then."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from loralab.adapters.base import Adapter
from loralab.numerics.hashing import mix

SIZE = 0.02  # of a parameter's root mean square, or of 1 where it is zero
SCALES = tuple(2.0**-power for power in (0, 4, 8, 16, 32))
MODERATE = 0.5  # relative change of a loss up to which rounding is not magnified beyond what is allowed for it


@contextmanager
def perturbed(adapter: nn.Module, scale: float) -> Iterator[None]:
    """Within, every parameter of ``adapter`` has noise added, the same each time; afterwards its old bits.

    One that trains the base itself (``changes_base``) is left alone: it is no difference to it, and its copy is large.
    """
    whole = isinstance(adapter, Adapter) and adapter.spec.changes_base
    kept = [] if whole or not scale else [(one, one.detach().clone()) for one in adapter.parameters()]
    try:
        with torch.no_grad():
            for place, (parameter, _) in enumerate(kept):
                _move(parameter, scale, mix(place))
        yield
    finally:
        with torch.no_grad():
            for parameter, old in kept:
                parameter.copy_(old)


def moderate(adapter: nn.Module, start: float, loss: Callable[[], float]) -> tuple[float, float]:
    """(the scale of ``perturbed`` at which ``loss()`` stays near ``start``, that loss); scale 0 where none does."""
    for scale in SCALES if math.isfinite(start) else ():
        with perturbed(adapter, scale):
            value = loss()
        if math.isfinite(value) and abs(value - start) <= MODERATE * abs(start):
            return scale, value
    return 0.0, loss()


def _move(parameter: torch.Tensor, scale: float, key: int) -> None:
    if not parameter.is_floating_point() or not parameter.numel():
        return
    generator = torch.Generator(device=parameter.device).manual_seed(key)
    noise = torch.empty_like(parameter).uniform_(-1.0, 1.0, generator=generator)
    size = float(parameter.detach().square().mean().sqrt()) or 1.0
    parameter.add_(noise, alpha=math.sqrt(3.0) * SIZE * scale * size)

"""Adapters of equal size: the rank, width or number of tokens at which a method trains as many numbers as another."""

import dataclasses
from collections.abc import Callable

from torch import nn

from loralab.adapters.base import AdapterSpec
from loralab.errors import ConfigError
from loralab.models import loading, pretrained
from loralab.planning.count import adapter_parameters

LARGEST = 2**31 - 1
TOLERATED = 0.1  # share of the budget that the nearest size may be off


def size_for(budget: int, model: pretrained.Pretrained, adapter: AdapterSpec) -> int:
    """The value of the field that ``adapter.size_field`` names whose ``adapter_parameters`` are nearest to ``budget``;
    of two equally near, the smaller.

    Raises ConfigError where the method has no such field, or where the nearest is off by more than a tenth.
    """
    field = adapter.size_field
    if not field:
        raise ConfigError(
            f"adapter={adapter.method} has no key that sets its number of parameters, so it cannot be fitted to a "
            "budget; valid: a method with a rank, a width or a number of tokens, such as lora"
        )
    base = loading.skeleton(model)

    def counted(size: int) -> int:
        return _counted(base, dataclasses.replace(adapter, **{field: size}))

    below = _largest_within(budget, counted)
    sizes = {size: counted(size) for size in (below, below + 1) if size and _possible(counted, size)}
    nearest = min(sizes, key=lambda size: (abs(sizes[size] - budget), size))
    if abs(sizes[nearest] - budget) > TOLERATED * budget:
        known = ", ".join(f"{field}={size} has {number:,}" for size, number in sizes.items())
        raise ConfigError(
            f"a budget of {budget:,} parameters is met by no adapter.{field} of adapter={adapter.method} within "
            f"{TOLERATED:.0%}: {known}; valid: a budget near one of these, or other adapter.target_modules"
        )
    return nearest


def _counted(base: nn.Module, adapter: AdapterSpec) -> int:
    attached = adapter.attach(base)
    try:
        return adapter_parameters(attached)
    finally:
        attached.detach()


def _possible(counted: Callable[[int], int], size: int) -> bool:
    """Whether the method takes that size on this base: blocks and positions end somewhere."""
    try:
        counted(size)
    except ConfigError:
        if size == 1:
            raise
        return False
    return True


def _largest_within(budget: int, counted: Callable[[int], int]) -> int:
    """The largest possible size with at most ``budget`` parameters, 0 where 1 has more; counts grow with the size."""

    def within(size: int) -> bool:
        return size <= LARGEST and _possible(counted, size) and counted(size) <= budget

    low, high = 0, 1
    while within(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if within(middle) else (low, middle)
    return low

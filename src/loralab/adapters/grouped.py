"""One function over the positions of several trials of a pass, each changed by its own delta."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Given = tuple[int, int, Any, int | None]  # (start, stop, delta, key): positions of a pass and what acts there


def by_part(y: Tensor, slices: Sequence[Given], change: Callable[[Tensor, Any, int | None], Tensor]) -> Tensor:
    """y (..., out) with ``change(own, delta, key)`` in place of ``own`` (positions, out) of each slice."""
    flat, parts, at = y.reshape(-1, y.shape[-1]), [], 0
    for start, stop, delta, key in slices:
        parts += [flat[at:start]] if at < start else []
        parts.append(change(flat[start:stop], delta, key))
        at = stop
    parts += [flat[at:]] if at < len(flat) else []
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(y.shape)

"""Dropout whose masks follow from a key: the same packed, alone, computed again and after a continuation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loralab.adapters.masks import LANES, Units, kept, lanes_dropped, scale_of

# where masks are drawn for the whole stack; a CPU draws them from a generator, trial by trial
COUNTED = {"cuda"}


@dataclass(frozen=True)
class Share:
    """Where the rows of one process stand in the batch that several processes share."""

    rows_before: int
    rows: int  # of all processes
    tokens_before: int
    tokens: int  # of all processes, padding not counted

    def units(self, rows: int, tokens: int | None) -> Units:
        """Those of this process's ``rows``, which have ``tokens`` where the batch is flat; None: it is not."""
        if tokens is None:
            return self.rows_before, rows, self.rows
        return self.tokens_before, tokens, self.tokens


def keyed_dropout(x: Tensor, p: float, key: int | None, length: int = 1) -> Tensor:
    """Inverted dropout whose mask depends on ``key`` alone, so a recomputed or packed forward draws the same.

    ``length``: positions of a row of x (..., features), padding counted; on a CPU a longer padding changes no mask.
    """
    return x if key is None or p == 0.0 else dropped(x, p, [(x.numel(), key)], length)


def dropped(x: Tensor, p: float, parts: Sequence[tuple[int, int]], length: int = 1) -> Tensor:
    """Inverted dropout of a stack: the mask of each part, (elements, key), depends on its key alone."""
    if x.device.type in COUNTED and lanes_dropped(p) < LANES:
        flat = x.reshape(-1, x.shape[-1])
        sizes = [size // x.shape[-1] for size, _ in parts]
        keep = kept(sizes, [key for _, key in parts], [p] * len(parts), length, flat)
        return (flat * keep).mul_(scale_of(p)).view(x.shape)
    drawn: Tensor = _Dropped.apply(x, p, parts, length)  # type: ignore[no-untyped-call]
    return drawn


def dropout_of_each(
    x: Tensor, parts: Sequence[tuple[int, float, int | None]], length: int = 1
) -> list[Callable[[Tensor], Tensor]]:
    """For each of a stack's parts, (positions, rate, key), the dropout of a tensor as wide as x: of as many positions,
    by its rate and key. A card draws the masks of all parts together."""
    drops = [key is not None and p > 0.0 for _, p, key in parts]
    if x.device.type not in COUNTED or not any(drops):
        return [partial(keyed_dropout, p=p, key=key, length=length) for _, p, key in parts]
    sizes, rates, keys = zip(*parts, strict=True)
    masks = kept(sizes, keys, rates, length, x).split_with_sizes(list(sizes))
    of_drops = zip(rates, masks, drops, strict=True)
    return [partial(_without, keep=keep, scale=scale_of(p)) if own else _whole for p, keep, own in of_drops]


def _without(x: Tensor, keep: Tensor, scale: float) -> Tensor:
    return (x * keep.view(x.shape)).mul_(scale)


def _whole(x: Tensor) -> Tensor:
    return x


def length_of(x: Tensor) -> int:
    """Positions of a row of x (rows, positions, features), padding counted; 1 where a row is one position, and of a
    single row, whose parts may be of any length (a flat batch)."""
    return x.shape[1] if x.dim() == 3 and x.shape[0] > 1 else 1


class _Dropped(torch.autograd.Function):
    """Keeps nothing: the masks are drawn again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, parts: Sequence[tuple[int, int]], length: int) -> Tensor:
        ctx.drawn = p, parts, length
        return _masked(x, p, parts, length)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return _masked(dy, *ctx.drawn), None, None, None


def _masked(x: Tensor, p: float, parts: Sequence[tuple[int, int]], length: int) -> Tensor:
    """Sixteen random bits an element, which is a quarter of a uniform number's cost.

    The bits of a part go to the first position of all its rows, then to the second: longer padding, which the rows of
    other trials may bring, takes those behind.
    """
    dropped_of = lanes_dropped(p)
    if dropped_of >= LANES:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    keep = torch.empty(x.shape, dtype=x.dtype, device=x.device)  # x and its gradient may differ in their strides
    for own, (size, key) in zip(torch.split(keep.view(-1), [size for size, _ in parts]), parts, strict=True):
        places = _positions(key, length, size // x.shape[-1])
        by_position = own.view(-1, places, x.shape[-1]).transpose(0, 1) if places > 1 else own
        bits = _bits(size, key, places, x.device).view(by_position.shape)
        torch.ge(bits, dropped_of - LANES // 2, out=by_position)
    return keep.mul_(x).mul_(scale_of(p))


def _positions(key: int, length: int, own: int) -> int:
    """Positions of a row of a part with ``own`` positions. That a single row is not a flat batch says its key, where
    other processes have the other rows."""
    units = getattr(key, "units", None)
    return own if units is not None and units[1] == 1 else length


def _bits(size: int, key: int, length: int, device: torch.device) -> Tensor:
    """Sixteen random bits for each of ``size`` elements, int16, those of the first position of all rows first."""
    units = getattr(key, "units", None)
    shared = units if units is not None and size % (units[1] * length) == 0 else None
    before, own, whole = shared or (0, 1, 1)
    drawn = size // own * whole
    words = torch.empty((drawn + 3) // 4, dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=torch.Generator(device=device).manual_seed(int(key)))
    bits = words.view(torch.int16)[:drawn]
    if shared is None:
        return bits
    return bits.view(length, whole, -1)[:, before : before + own].reshape(-1)

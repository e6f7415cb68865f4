"""Dropout masks of all trials of a stack at once: a function of key and position, evaluated on the device.

The number of operations does not grow with the trials, and no generator is made, which a CUDA graph forbids. Of what
they work with, one small tensor changes from pass to pass; all layers share it.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from loralab.numerics.hashing import counted, hashed, mix
from loralab.numerics.stacks import sent

LANES = 2**16  # values of the random bits that decide on an element
Units = tuple[int, int, int]  # those before this process's own, its own, those of all processes
Layout = tuple[tuple[int, Units | None], ...]  # of each trial: its positions, its units


class MaskKey(int):
    """The key of one mask, made of ``trial``, a trial's key of a pass, and ``place``, the words of a place in it.

    ``units``: of which rows (or tokens of a flat batch) this process draws the mask; the masks of all processes
    together are that of one. None: it draws all of it.
    """

    trial: int
    place: tuple[int, ...]
    units: Units | None

    def __new__(cls, trial: int, place: tuple[int, ...], units: Units | None = None) -> "MaskKey":
        made = super().__new__(cls, mix(trial, *place))
        made.trial, made.place, made.units = int(trial), place, units
        return made


def lanes_dropped(p: float) -> int:
    """How many of LANES drop an element: p is met to 1 in 131072."""
    return round(p * LANES)


def scale_of(p: float) -> float:
    """What the elements that are kept are multiplied by; 0 where none is."""
    dropped_of = lanes_dropped(p)
    return LANES / (LANES - dropped_of) if dropped_of < LANES else 0.0


def kept(sizes: Sequence[int], keys: Sequence[int | None], rates: Sequence[float], length: int, x: Tensor) -> Tensor:
    """Which elements of the positions of x (..., width) are kept, bool, (positions, width): of each trial's ``sizes``
    positions by its key and rate alone, whoever shares the pass. A trial without a key keeps all.

    ``length``: positions of a row, padding counted; a longer padding changes no mask.
    """
    given = next(key for key in keys if key is not None)
    dropped_of = tuple(0 if key is None else lanes_dropped(p) for key, p in zip(keys, rates, strict=True))
    width = x.shape[-1]
    if isinstance(x, FakeTensor):  # nothing that is kept for the real ones
        starts, columns = (x.new_empty(*shape, dtype=torch.int64) for shape in ((sum(sizes), 1), (-(-width // 4),)))
        threshold: Tensor | int = 0
    else:
        trials = tuple(getattr(key, "trial", key or 0) for key in keys)
        layout = tuple((size, getattr(key, "units", None)) for size, key in zip(sizes, keys, strict=True))
        starts = _starts(trials, layout, length, x.device)
        columns = _columns(getattr(given, "place", ()), -(-width // 4), x.device)
        threshold = _threshold(dropped_of, tuple(sizes), x.device)
    lanes = hashed(starts + columns).view(torch.int16)[:, :width]
    return lanes >= threshold


@lru_cache(maxsize=16)  # all layers of a pass ask for the same
def _starts(trials: tuple[int, ...], layout: Layout, length: int, device: torch.device) -> Tensor:
    """(positions, 1): a number for each position, from its trial's key."""
    keys = torch.tensor([mix(trial) for trial in trials])
    of_each = keys.repeat_interleave(torch.tensor([size for size, _ in layout]))
    return sent(counted(of_each, _places(layout, length))[:, None], device)


@lru_cache(maxsize=64)
def _places(layout: Layout, length: int) -> Tensor:
    """The number of each position in its trial's batch: the first position of all rows, then the second, so that
    padding is behind all else."""
    places = []
    for size, units in layout:
        at, own_length, before, whole = torch.arange(size), length, 0, size // length
        if units is not None and size % units[1] == 0:
            before, own, whole = units
            own_length = size // own
        places.append(at % own_length * whole + before + at // own_length)
    return torch.cat(places)


@lru_cache(maxsize=2048)  # a few thousand bytes for each layer
def _columns(place: tuple[int, ...], count: int, device: torch.device) -> Tensor:
    """(count,) a number for each four elements of a position, at this place of the model."""
    return sent(counted(mix(1, *place), torch.arange(count)), device)


def _threshold(dropped_of: tuple[int, ...], sizes: tuple[int, ...], device: torch.device) -> Tensor | int:
    """The least 16 bits, as a signed number, that keep an element: of all positions, or (positions, 1) of each."""
    if len(set(dropped_of)) == 1 and dropped_of[0] < LANES:
        return dropped_of[0] - LANES // 2
    return _thresholds(dropped_of, sizes, device)


@lru_cache(maxsize=64)
def _thresholds(dropped_of: tuple[int, ...], sizes: tuple[int, ...], device: torch.device) -> Tensor:
    of_each = torch.tensor(dropped_of, dtype=torch.int32) - LANES // 2
    return sent(of_each.repeat_interleave(torch.tensor(sizes))[:, None], device)

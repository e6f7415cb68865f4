"""Tensors that lie side by side in one memory are a stack already; and how one goes to a device, or comes from it,
without a wait."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors, of one shape, along a new first dimension: a view where they lie side by side."""
    there = side_by_side(tensors)
    return torch.stack(list(tensors)) if there is None else there


def side_by_side(tensors: Sequence[Tensor]) -> Tensor | None:
    """A view of all, (number, ...), where they are contiguous and lie at equal distances in one memory, as the
    parameters of a pack do; else None."""
    first, count = tensors[0], len(tensors)
    if count < 2 or torch.compiler.is_compiling():  # a graph holds no addresses
        return None
    storage, unit = first.untyped_storage(), first.element_size()
    if isinstance(first, FakeTensor):  # has no address
        if any(one.untyped_storage()._cdata != storage._cdata for one in tensors):
            return None
        begin, places = 0, [one.storage_offset() * unit for one in tensors]
    else:
        begin, places = storage.data_ptr(), [one.data_ptr() for one in tensors]
    step = places[1] - places[0]
    inside = begin <= places[0] and places[0] + (count - 1) * step + first.nbytes <= begin + storage.nbytes()
    if not inside or step < first.nbytes or step % unit:
        return None
    if any(place != places[0] + i * step for i, place in enumerate(places)):
        return None
    if not all(one.is_contiguous() for one in tensors):
        return None
    return first.detach().as_strided((count, *first.shape), (step // unit, *first.stride()))


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor``, of the host, on ``device``, for which the host does not wait."""
    if torch.compiler.is_compiling():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def received(tensor: Tensor) -> Callable[[], Tensor]:
    """What gives ``tensor`` on the host, where it is being copied to from a card: only who asks for it waits."""
    if tensor.device.type != "cuda":
        return lambda: tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()

    def get() -> Tensor:
        copied.synchronize()
        return host

    return get

"""Tensors that lie side by side in one memory are a stack already."""

from collections.abc import Sequence

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
    if count < 2 or isinstance(first, FakeTensor):
        return None
    begin, step = first.data_ptr(), tensors[1].data_ptr() - first.data_ptr()
    storage, unit = first.untyped_storage(), first.element_size()
    inside = begin + (count - 1) * step + first.nbytes <= storage.data_ptr() + storage.nbytes()
    if not inside or step < first.nbytes or step % unit:
        return None
    if any(one.data_ptr() != begin + i * step or not one.is_contiguous() for i, one in enumerate(tensors)):
        return None
    return first.detach().as_strided((count, *first.shape), (step // unit, *first.stride()))

"""Mixtures of experts for fake tensors: a replacement of the grouped product, whose fake kernel takes only bfloat16.

Rows sorted by expert, (n, in), times (experts, in, out). With a frozen weight no input is kept for the backward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(weight, offsets, *([x] if ctx.needs_input_grad[1] else []))
        return x.new_empty(x.shape[0], weight.shape[-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, _, *inputs = ctx.saved_tensors
        dx = dy.new_empty(dy.shape[0], weight.shape[1]) if ctx.needs_input_grad[0] else None
        return dx, torch.empty_like(weight) if inputs else None, None


def _grouped_mm(mat_a: Tensor, mat_b: Tensor, *, offs: Tensor, **_: Any) -> Tensor:
    product: Tensor = _Grouped.apply(mat_a, mat_b, offs)  # type: ignore[no-untyped-call]
    return product


@contextmanager
def grouped_products() -> Iterator[None]:
    """Inside, ``F.grouped_mm`` is replaced by a function that allocates what its kernels do."""
    if not hasattr(F, "grouped_mm"):  # older torch: transformers multiplies expert by expert
        yield
        return
    with patch.object(F, "grouped_mm", _grouped_mm):
        yield

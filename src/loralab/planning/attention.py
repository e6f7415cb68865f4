"""Scaled dot product attention for fake tensors, with the memory of the fused kernels.

The operator registered for CPUs gives its output other strides under fake tensors than it has, so that transformers'
``transpose(1, 2).contiguous()`` would be counted as a copy. What is kept for the backward pass, by kernel
(torch 2.13, aten/native/transformers):
  flash       q, k, v, the output as (B, T, H, D) and the logsumexp (B, H, T) in float32; takes no mask
  efficient   the same; takes a mask, and a boolean one is copied in q's dtype in each layer
  math        everything, the probabilities too
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from loralab.forward import varlen

HALF = (torch.float16, torch.bfloat16)
FLASH_WIDTH = 256  # the widest head of CUDA's flash kernel


class _Fused(torch.autograd.Function):
    """Allocates and keeps what the flash and the efficient kernel do."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, cuda: bool) -> Tensor:
        rows, heads, length, _ = q.shape
        out = q.new_empty(rows, length, heads, v.shape[-1]).transpose(1, 2)
        lse = q.new_empty(rows, heads, length, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, bias, out, lse)
        ctx.cuda = cuda
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, _, lse = ctx.saved_tensors
        sums = torch.empty_like(lse)  # of dout * out, by row
        wide = q.shape[1] if ctx.cuda else k.shape[1]  # CUDA makes dk and dv for each query head and adds them up
        grads = [_like(q, q.shape[1]), _like(k, wide), _like(v, wide)]
        if ctx.cuda and q.dtype in HALF:
            accumulated = q.new_empty(q.shape, dtype=torch.float32)
            del accumulated
        del sums
        groups = wide // k.shape[1]
        if groups > 1:
            grads[1:] = [g.view(g.shape[0], -1, groups, *g.shape[2:]).sum(2) for g in grads[1:]]
        return (*grads, torch.empty_like(bias) if ctx.needs_input_grad[3] else None, None)


def _like(x: Tensor, heads: int) -> Tensor:
    """An empty tensor (B, heads, T, D) with the strides of a kernel's output."""
    return x.new_empty(x.shape[0], x.shape[2], heads, x.shape[3]).transpose(1, 2)


def attention(cuda: bool) -> Any:
    """A replacement of ``F.scaled_dot_product_attention`` that picks the kernel as the device does."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, float("-inf")).to(query.dtype)
        alike = query.shape[:2] == key.shape[:2] == value.shape[:2]  # no kernel broadcasts rows or heads
        if (alike or enable_gqa) and _fused(cuda, query, attn_mask, dropout_p, enable_gqa):
            out: Tensor = _Fused.apply(query, key, value, attn_mask, cuda)  # type: ignore[no-untyped-call]
            return out
        math: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )
        return math[0]

    return attend


def _fused(cuda: bool, q: Tensor, mask: Tensor | None, dropout: float, gqa: bool) -> bool:
    """True if the device has a fused kernel for this call."""
    if not cuda:
        return dropout == 0.0 and not (mask is not None and mask.requires_grad)
    flash = mask is None and q.dtype in HALF and q.shape[-1] <= FLASH_WIDTH
    return flash or not gqa  # the efficient kernel takes masks and float32, but wants as many k and v as q


@contextmanager
def kernels(cuda: bool) -> Iterator[None]:
    """Inside, attention allocates as CUDA's or a CPU's kernels do; with ``cuda``, its autocast rules hold too."""
    with patch.object(F, "scaled_dot_product_attention", attention(cuda)):
        if not cuda:
            yield
            return
        with (
            patch.object(F, "layer_norm", _float32(F.layer_norm)),
            patch.object(F, "softmax", _float32(F.softmax)),
            patch.object(varlen, "DEVICES", {"cpu"}),
            patch.object(varlen, "attend", _varlen),
        ):
            yield


def _varlen(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    """A flash kernel's memory, whose rows lie behind each other."""
    out: Tensor = _Fused.apply(query, key, value, None, True)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2)


def _float32(function: Any) -> Any:
    """``function`` in float32 under autocast, as on CUDA; a CPU's autocast does not do that."""

    def computed(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return function(x, *args, **kwargs)  # type: ignore[no-any-return]
        x = x.float()
        with torch.autocast("cpu", enabled=False):
            return function(x, *args, **kwargs)  # type: ignore[no-any-return]

    return computed

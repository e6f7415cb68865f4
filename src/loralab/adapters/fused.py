"""LoRA's update as one autograd function: y + scaling * drop(x) A^T B^T over the rows of every trial of a pass.

Autograd's own graph would keep the dropped-out x beside x and write the update three times (B A x, scaled, added). This
one keeps x and h = drop(x) A^T, draws dropout again from its key, and adds into y as the product is made.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loralab.adapters.dropout import keyed_dropout
from loralab.adapters.products import as_dtype, products_dtype
from loralab.adapters.runs import Part, Together
from loralab.quantization.linear import without_autocast

# where the products of all parts are made together; on a CPU this takes as long or longer than one after the other
TOGETHER = {"cuda"}


def lora_update(x: Tensor, y: Tensor, parts: Sequence[Part], factors: Sequence[Tensor]) -> Tensor:
    """y (..., out) with each part's update added; x (..., in), ``factors``: A (r, in) and B (out, r) of
    each part in turn. y is written to, unless it is a view of something else."""
    if (not torch.compiler.is_compiling() and y._is_view()) or not y.is_contiguous() or (y.is_leaf and y.requires_grad):
        y = y.clone(memory_format=torch.contiguous_format)
    # a single one too where it drops: its mask is drawn once
    many = len(parts) > 1 or any(part.rate for part in parts)
    function = Together if many and x.device.type in TOGETHER else _Update
    updated: Tensor = function.apply(x, y, tuple(parts), *factors)  # type: ignore[no-untyped-call]
    return updated


class _Update(torch.autograd.Function):
    """The products are small and many, so what surrounds them counts: views are made once, results written in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, parts: tuple[Part, ...], *factors: Tensor) -> Tensor:
        ctx.parts = parts
        ctx.dtype = products_dtype(x, factors)
        inner = []
        xs, ys = _views(x.reshape(-1, x.shape[-1]), parts), _views(y.view(-1, y.shape[-1]), parts)
        with without_autocast(x.device.type):
            for part, own, out, (a, b) in zip(parts, xs, ys, _pairs(factors), strict=True):
                h = torch.mm(_input(own, part, ctx.dtype), as_dtype(a, ctx.dtype).t())
                _add(out, h, as_dtype(b, ctx.dtype).t(), part.scaling)
                inner.append(h)
        ctx.save_for_backward(x, *factors, *inner)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        count = 2 * len(ctx.parts)
        factors, inner = saved[:count], saved[count:]
        dx = _like(x, ctx.parts) if ctx.needs_input_grad[0] else None
        dxs = [None] * len(ctx.parts) if dx is None else _views(dx, ctx.parts)
        xs = _views(x.reshape(-1, x.shape[-1]), ctx.parts)
        dys = _views(dy.reshape(-1, dy.shape[-1]), ctx.parts)
        trained = any(ctx.needs_input_grad[3:])  # PiSSA's A0 and B0 are not
        found: list[Tensor | None] = [] if trained else [None] * count
        with without_autocast(x.device.type):
            for part, own, back, out, (a, b), h in zip(ctx.parts, xs, dys, dxs, _pairs(factors), inner, strict=True):
                back = as_dtype(back, ctx.dtype)
                dh = _scaled(back, as_dtype(b, ctx.dtype), part.scaling)
                if trained:
                    found.append(as_dtype(torch.mm(dh.t(), _input(own, part, ctx.dtype)), a.dtype))
                    found.append(as_dtype(_scaled(back.t(), h, part.scaling), b.dtype))
                if out is not None:
                    _into(out, dh, as_dtype(a, ctx.dtype), part)
        return None if dx is None else dx.view(x.shape), dy, None, *found


def _views(flat: Tensor, parts: Sequence[Part]) -> Sequence[Tensor]:
    """Each part's rows of ``flat`` (positions, width): one operation where the parts follow each other."""
    sizes, at = [], 0
    for part in parts:
        if part.start != at:
            return [flat[part.start : part.stop] for part in parts]
        sizes.append(part.stop - part.start)
        at = part.stop
    views: Sequence[Tensor] = flat[:at].split_with_sizes(sizes)
    return views


def _scaled(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """scaling * left right, in one product."""
    made = left.new_empty(left.shape[0], right.shape[1])
    return torch.addmm(made, left, right, beta=0, alpha=scaling, out=made)


def _into(out: Tensor, dh: Tensor, a: Tensor, part: Part) -> None:
    """The part's gradient of x, written where it belongs."""
    if out.dtype == dh.dtype and not part.rate:
        torch.mm(dh, a, out=out)
    else:
        out.copy_(keyed_dropout(torch.mm(dh, a).to(out.dtype), part.dropout, part.key, part.length))


def _pairs(factors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(factors[::2], factors[1::2], strict=True))


def _input(own: Tensor, part: Part, dtype: torch.dtype) -> Tensor:
    """The part's inputs, dropped out, (n, in). The same values however often it is asked for."""
    return as_dtype(keyed_dropout(own, part.dropout, part.key, part.length), dtype)


def _add(y: Tensor, h: Tensor, b: Tensor, scaling: float) -> None:
    if y.dtype == h.dtype:
        y.addmm_(h, b, alpha=scaling)
    else:
        y.add_((h @ b).mul_(scaling).to(y.dtype))


def _like(x: Tensor, parts: Sequence[Part]) -> Tensor:
    """For the gradient of x, (positions, in); zero where they belong to nobody."""
    count = x.numel() // x.shape[-1]
    make = torch.empty if sum(part.stop - part.start for part in parts) == count else torch.zeros
    return make(count, x.shape[-1], dtype=x.dtype, device=x.device)

"""Frozen language-model head and cross-entropy in one function: no logits are kept, none are made where nothing is
predicted.

The head has no gradient of its own, so the gradient of its input can be made in the forward pass, chunk by chunk, while
a chunk's logits are still there. What is kept for the backward pass is one gradient row a target.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loralab.adapters.hooks import acts
from loralab.quantization.linear import without_autocast

CHUNK = 512  # target rows whose logits are there at once
SPREADS = (1.0, 1e4)  # of made-up logits: a cap is seen far out, a shift near zero
# A CPU's GEMM rounds a row otherwise where there are few rows, and where it splits a long sum by their number (oneMKL
# 2024.2 with AVX-512: fewer than 16 rows; sums of 1024 terms and more beside fewer than 192 rows).
LEAST = 16  # rows of a product
TERMS = 512  # of a sum at once


class _NLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        losses, predictions, gradients = [], [], []
        for rows, labels in zip(torch.split(hidden, CHUNK), torch.split(targets, CHUNK), strict=True):
            short = max(0, LEAST - len(rows))
            logits = F.linear(F.pad(rows, (0, 0, 0, short)) if short else rows, weight, bias)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            highest, found = logits.max(-1, keepdim=True)
            at = F.pad(labels, (0, short))[:, None]
            chosen = logits.sub_(highest).gather(1, at)
            total = logits.exp_().sum(-1, keepdim=True)
            losses.append((total.log() - chosen)[: len(rows), 0])
            predictions.append(found[: len(rows), 0])
            if ctx.needs_input_grad[0]:
                logits.div_(total).scatter_add_(1, at, -torch.ones_like(total))  # softmax minus one-hot
                gradients.append(_summed(logits.to(weight.dtype), weight)[: len(rows)].to(hidden.dtype))
        ctx.save_for_backward(*([torch.cat(gradients)] if gradients else []))
        best = torch.cat(predictions)
        ctx.mark_non_differentiable(best)
        return torch.cat(losses), best

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        (gradients,) = ctx.saved_tensors
        return gradients * grad[:, None].to(gradients.dtype), None, None, None


def _summed(logits: Tensor, weight: Tensor) -> Tensor:
    """``logits @ weight``, (rows, V) by (V, width); on a CPU, in float32, with the same bits beside any number of other
    rows."""
    kind = logits.device.type
    half = logits.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(kind)
    if kind != "cpu" or half:  # which would round each part
        return logits @ weight
    first, *others = zip(torch.split(logits, TERMS, 1), torch.split(weight, TERMS), strict=True)
    with without_autocast("cpu"):  # which would round the first product, and refuse the others
        total: Tensor = first[0] @ first[1]
        for part, terms in others:
            total.addmm_(part, terms)
    return total


def head_nll(hidden: Tensor, targets: Tensor, head: nn.Linear) -> tuple[Tensor, Tensor]:
    """(negative log-likelihood (n,) in float32, predictions (n,)) of hidden (n, width) and targets (n,)."""
    if not len(targets):
        return hidden.sum(-1).float(), targets
    scored: tuple[Tensor, Tensor] = _NLL.apply(hidden, targets, head.weight, head.bias)  # type: ignore[no-untyped-call]
    return scored


def frozen_head(model: nn.Module, owners: Collection[nn.Module] = ()) -> nn.Linear | None:
    """The model's output embeddings, where they are a plain linear layer that nobody watches or trains, and none of
    ``owners``, the adapters of a pass, changes."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if type(head) is not nn.Linear or head.weight.requires_grad:
        return None
    return None if head._forward_pre_hooks or acts(head, owners) else head


@torch.no_grad()
def hands_on(model: nn.Module, head: nn.Linear, inputs: Mapping[str, Any]) -> bool:
    """Whether the model's logits are its head's, bit for bit, whatever they may become in training: nothing scales,
    caps, shifts or normalizes them. Seen by logits of its own making in the head's place."""
    generator = torch.Generator().manual_seed(0)
    for spread in SPREADS:
        made: list[Tensor] = []

        def make(hidden: Tensor, spread: float = spread, made: list[Tensor] = made) -> Tensor:
            drawn = torch.randn(*hidden.shape[:-1], head.out_features, generator=generator) * spread
            made.append(drawn.to(hidden))
            return made[-1]

        head.forward = make  # type: ignore[method-assign,assignment]
        try:
            logits = model(**inputs).logits
        finally:
            del head.forward
        if len(made) != 1 or not torch.equal(logits.float(), made[0].float()):
            return False
    return True


@contextmanager
def bypassed(head: nn.Linear) -> Iterator[list[Tensor]]:
    """Within, the model hands on what would enter its head, in place of logits; yields what did."""
    given: list[Tensor] = []

    def same(hidden: Tensor) -> Tensor:
        given[:] = [hidden]
        return hidden

    head.forward = same  # type: ignore[method-assign,assignment]
    try:
        yield given
    finally:
        del head.forward

"""Frozen language-model head and cross-entropy in one function: logits are computed at targets only and not stored.

The head has no gradient of its own, so the gradient of its input can be computed in the forward pass, chunk by chunk,
while a chunk's logits exist. Stored for the backward pass is one gradient row (width,) per target.
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

CHUNK = 512  # targets whose logits exist at once
SPREADS = (1.0, 1e4)  # standard deviations of random logits: large ones show a cap, small ones a shift
# A CPU's GEMM rounds a row in another way where there are few rows, and where it splits a long sum by their number
# (oneMKL 2024.2 with AVX-512: fewer than 16 rows; sums of 1024 or more terms with fewer than 192 rows).
MIN_ROWS = 16  # of a product
MAX_TERMS = 512  # of one sum


class _NLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        losses, predictions, gradients = [], [], []
        for rows, labels in zip(torch.split(hidden, CHUNK), torch.split(targets, CHUNK), strict=True):
            missing = max(0, MIN_ROWS - len(rows))
            logits = F.linear(F.pad(rows, (0, 0, 0, missing)) if missing else rows, weight, bias)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            highest, predicted = logits.max(-1, keepdim=True)
            target = F.pad(labels, (0, missing))[:, None]
            target_logits = logits.sub_(highest).gather(1, target)
            total = logits.exp_().sum(-1, keepdim=True)
            losses.append((total.log() - target_logits)[: len(rows), 0])
            predictions.append(predicted[: len(rows), 0])
            if ctx.needs_input_grad[0]:
                logits.div_(total).scatter_add_(1, target, -torch.ones_like(total))  # softmax minus one-hot
                gradients.append(_times_weight(logits.to(weight.dtype), weight)[: len(rows)].to(hidden.dtype))
        ctx.save_for_backward(*([torch.cat(gradients)] if gradients else []))
        best = torch.cat(predictions)
        ctx.mark_non_differentiable(best)
        return torch.cat(losses), best

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        (gradients,) = ctx.saved_tensors
        return gradients * grad[:, None].to(gradients.dtype), None, None, None


def _times_weight(logits: Tensor, weight: Tensor) -> Tensor:
    """``logits @ weight``, (rows, V) by (V, width); on a CPU in float32 a row's bits do not depend on the number of
    rows."""
    kind = logits.device.type
    half = logits.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(kind)
    if kind != "cpu" or half:  # each part of the sum would be rounded
        return logits @ weight
    first, *others = zip(torch.split(logits, MAX_TERMS, 1), torch.split(weight, MAX_TERMS), strict=True)
    with without_autocast("cpu"):  # it would round the first product and reject addmm_
        total: Tensor = first[0] @ first[1]
        for part, terms in others:
            total.addmm_(part, terms)
    return total


def head_nll(hidden: Tensor, targets: Tensor, head: nn.Linear) -> tuple[Tensor, Tensor]:
    """hidden (n, width), targets (n,) -> (negative log-likelihood (n,) float32, predicted token ids (n,))."""
    if not len(targets):
        return hidden.sum(-1).float(), targets
    losses_and_predictions: tuple[Tensor, Tensor] = _NLL.apply(hidden, targets, head.weight, head.bias)  # type: ignore[no-untyped-call]
    return losses_and_predictions


def frozen_head(model: nn.Module, owners: Collection[nn.Module] = ()) -> nn.Linear | None:
    """The model's output embeddings where they are a frozen nn.Linear without hooks that none of ``owners``, the
    adapters of a pass, changes; else None."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if type(head) is not nn.Linear or head.weight.requires_grad:
        return None
    return None if head._forward_pre_hooks or acts(head, owners) else head


@torch.no_grad()
def hands_on(model: nn.Module, head: nn.Linear, inputs: Mapping[str, Any]) -> bool:
    """Whether the model returns its head's output as logits, bit for bit, and does not scale, cap, shift or normalize
    it. Tried with random logits in place of the head's."""
    generator = torch.Generator().manual_seed(0)
    for spread in SPREADS:
        outputs: list[Tensor] = []

        def random_logits(hidden: Tensor, spread: float = spread, outputs: list[Tensor] = outputs) -> Tensor:
            normal = torch.randn(*hidden.shape[:-1], head.out_features, generator=generator)
            outputs.append((normal * spread).to(hidden))
            return outputs[-1]

        head.forward = random_logits  # type: ignore[method-assign,assignment]
        try:
            logits = model(**inputs).logits
        finally:
            del head.forward
        if len(outputs) != 1 or not torch.equal(logits.float(), outputs[0].float()):
            return False
    return True


@contextmanager
def bypassed(head: nn.Linear) -> Iterator[list[Tensor]]:
    """Within, ``head`` returns its input, so that the model returns it as logits; yields a list of the last input."""
    inputs: list[Tensor] = []

    def identity(hidden: Tensor) -> Tensor:
        inputs[:] = [hidden]
        return hidden

    head.forward = identity  # type: ignore[method-assign,assignment]
    try:
        yield inputs
    finally:
        del head.forward

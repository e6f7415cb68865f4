"""DoRA: each row of W + scaling B A is given a trained length m (Liu et al. 2024, arXiv:2402.09353, equation 5).

y = m / ||W + scaling B A|| (W x + scaling B A x) + bias, where the norm is held constant in the backward pass (section
4.3). W x is the base's own product, taken as it is: dropout acts on the low-rank part alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapters.grouped import Given, by_part
from loralab.quantization.base import dense_weight
from loralab.quantization.linear import without_autocast


@torch.no_grad()
def squared_rows(layer: nn.Module) -> Tensor:
    """The squared length of each row of the layer's weight, (out,), in float32, whatever it is quantized by."""
    return dense_weight(layer).float().square().sum(1)


@torch.no_grad()
def row_norms(weight: Tensor, squares: Tensor, low_rank: Any) -> Tensor:
    """||W + scaling B A|| of each row, (out,). Begun at ``squares``, those of W: it is exactly theirs while B is zero,
    and no second matrix as large as W is made."""
    a: Tensor = low_rank.lora_A.float()
    b: Tensor = low_rank.lora_B.float()
    scaling: float = low_rank.scaling
    with without_autocast(weight.device.type):
        mixed = ((weight @ a.t()) * b).sum(1)
        own = ((b @ (a @ a.t())) * b).sum(1)
    return (squares + 2 * scaling * mixed + scaling**2 * own).clamp_min(0).sqrt()


def ratio(weight: Tensor, delta: Any, squares: Tensor) -> Tensor:
    """m / ||W + scaling B A||, (out,); 1 where a row has no length. ``squares``: those of the rows of W."""
    norms = row_norms(weight, squares, delta)
    whole = norms > 0
    return torch.where(whole, delta.lora_magnitude_vector / torch.where(whole, norms, 1.0), 1.0)


def rescaled(layer: nn.Module, y: Tensor, update: Tensor, slices: Sequence[Given]) -> Tensor:
    """y (..., out), what ``layer`` gives, and ``update``, scaling B A x of every trial, put together. The weight of the
    layer is made dense once, for all of them."""
    weight = dense_weight(layer).detach().float()
    bias: Any = layer.bias
    flat = update.reshape(-1, update.shape[-1])
    updates = iter([flat[start:stop] for start, stop, _, _ in slices])

    def change(own: Tensor, delta: Any, key: int | None) -> Tensor:
        scale = ratio(weight, delta, delta.squares)
        product = own if bias is None else own - bias.detach().to(own.dtype)
        return (own + (scale - 1) * product + scale * next(updates)).to(own.dtype)

    return by_part(y, slices, change)

"""A module of the base, copied to be trained: float32, and dense where the base is quantized."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from loralab.adapters.hooks import bare_copy
from loralab.quantization import gemm
from loralab.quantization.base import dense_weight, linear_shape
from loralab.quantization.linear import FrozenLinear


def trainable_copy(module: nn.Module) -> nn.Module:
    """A float32 copy of ``module`` without hooks, all of whose parameters train. Of a quantized layer: a dense one that
    begins at the values its codes stand for."""
    if isinstance(module, FrozenLinear):
        return dense_copy(module)
    copied = bare_copy(module)
    for name, part in list(copied.named_modules()):
        if isinstance(part, FrozenLinear):
            copied.set_submodule(name, dense_copy(part))
    return copied.float().requires_grad_(True)


def dense_copy(layer: FrozenLinear) -> nn.Module:
    """The layer's weight, trainable, as the kind of layer that it was."""
    out_features, in_features = linear_shape(layer)
    made: nn.Module
    if layer.transposed:
        made = DenseConv1D(out_features, in_features)
    else:
        made = DenseLinear(in_features, out_features, layer.bias is not None)
    weight = dense_weight(layer).detach().float()
    made.weight = nn.Parameter((weight.t() if layer.transposed else weight).contiguous())
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach().float().clone())
    elif layer.transposed:
        made.bias = nn.Parameter(torch.zeros(out_features, device=weight.device))
    return made


class DenseLinear(nn.Linear):
    """Multiplies by the library that the frozen layer does, so that training begins at its very bits."""

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.weight, self.bias)


class DenseConv1D(Conv1D):  # type: ignore[misc]
    """The same with the weight kept as (in, out)."""

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.weight.t(), self.bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):
        return nn.functional.linear(x, weight, bias)
    y: Tensor = _Product.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = gemm.linear(x, weight, bias)
        # a view that a function of ours returns must not be written to
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        flat = dy.reshape(-1, dy.shape[-1])
        dx = gemm.backward(dy, weight) if ctx.needs_input_grad[0] else None
        dw = flat.t() @ x.reshape(-1, x.shape[-1])
        return dx, dw, flat.sum(0) if ctx.needs_input_grad[2] else None

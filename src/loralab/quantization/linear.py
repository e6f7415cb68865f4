"""The base class of all frozen layers: y = x W^T + b, with W dequantized for each use and without a gradient.

bitsandbytes' own layers are not used: on CPUs its 4-bit layer repacks itself at the first evaluation, after which the
input has no gradient; its 8-bit layer computes another product in training than in evaluation; and both have a
``weight`` of dtype uint8 or int8, to which transformers' T5 then casts its input.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loralab.quantization import gemm
from loralab.quantization.reads import OWNER

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """A context without autocast; an empty one where there is none, because entering one costs a small layer time."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


class _Product(torch.autograd.Function):
    """Saves the layer for the backward pass, neither dense weight nor input: dx = dy W, with W dequantized again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: "FrozenLinear") -> Tensor:
        ctx.layer, ctx.dtype = layer, layer.compute_dtype_for(x)
        with without_autocast(x.device.type):
            y = layer.product(x.to(ctx.dtype), bias).to(x.dtype)
        # autograd forbids in-place writes to a view from a custom function, and some models do that (RoCBert)
        if torch.compiler.is_compiling() or not y._is_view():  # a compiled graph has no views of that kind
            return y
        return torch.ops.aten._unsafe_view(y, y.shape)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        dx = db = None
        with without_autocast(dy.device.type):
            if ctx.needs_input_grad[0]:
                dx = gemm.backward(dy.to(ctx.dtype), ctx.layer.unpacked(ctx.dtype)).to(dy.dtype)
            if ctx.needs_input_grad[1]:
                db = dy.reshape(-1, dy.shape[-1]).sum(dim=0).to(ctx.layer.bias.dtype)
        return dx, db, None


class FrozenLinear(nn.Module, ABC):
    """x (..., in) -> (..., out). Subclasses store packed tensors with ``keep`` and dequantize them in ``dense``.

    Under autocast x is first cast to the autocast dtype, as nn.Linear does. ``compute_dtype`` "auto" then computes in
    x's dtype; any other casts x to that dtype and the product back. Training and evaluation compute the same.
    """

    bias: nn.Parameter | None
    resident: Tensor | None
    scheme = ""
    transposed = False  # made from a Conv1D, whose weight is (in, out)
    stored_key: str | None = None  # name of the checkpoint's tensor that is its weight; None: it is not one tensor

    def __init__(
        self, weight: Tensor, bias: nn.Parameter | None, compute_dtype: str = "auto", dequantize: str = "per_use"
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dense_dtype = weight.dtype  # .weight.dtype where compute_dtype is auto
        self.compute_dtype, self.dequantize = compute_dtype, dequantize
        self.packed_names: list[str] = []
        self.register_parameter("bias", bias)
        self.register_buffer("resident", None, persistent=False)

    def keep(self, **tensors: Tensor) -> None:
        """Stores packed tensors as buffers by name: ``.to(device)`` moves them, and no state dict has them."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)
            self.packed_names.append(name)

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight, a new tensor (out_features, in_features)."""

    def code_tables(self) -> list[Tensor]:
        """The code books that the layer uses, which all layers of the process share."""
        return []

    def levels(self) -> tuple[Tensor, int] | None:
        """(each weight's code (out in,) int64, in the order of the codes' values from 0; the number of codes); None
        where weights have no codes."""
        codes = getattr(self, "codes", None)
        return None if codes is None else (codes.reshape(-1).long() - torch.iinfo(codes.dtype).min, 256)

    def packed(self) -> list[Tensor]:
        """The packed tensors: codes and statistics, whose bytes are the weight's."""
        return [getattr(self, name) for name in self.packed_names]

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight: one that stays in memory ("resident"), or new at each call ("per_use", and "auto"
        where ``keep_dense`` has not said which)."""
        if self.dequantize != "resident":
            return self.dense(dtype)
        if self.resident is None or self.resident.dtype != dtype:
            with (
                torch.inference_mode(False),
                torch.no_grad(),
            ):  # the first call may be a validation's, in inference mode
                self.resident = self.dense(dtype)
        return self.resident

    def compute_dtype_for(self, x: Tensor) -> torch.dtype:
        return COMPUTE_DTYPES.get(self.compute_dtype, x.dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in) in the compute dtype -> (..., out), without a graph."""
        return gemm.linear(x, self.unpacked(x.dtype), None if bias is None else bias.to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y: Tensor = _Product.apply(x, self.bias, self)  # type: ignore[no-untyped-call]
        return y

    @property
    def weight(self) -> Tensor:
        """A tensor of nan with the weight's shape, dtype and device, for code that reads these; values: ``dense``."""
        dtype = COMPUTE_DTYPES.get(self.compute_dtype, self.dense_dtype)
        value = torch.full((), torch.nan, dtype=dtype, device=self.packed()[0].device)
        value = value.expand(self.out_features, self.in_features)
        setattr(value, OWNER, self)
        return value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenLinear":
        """Packed tensors move to a device, but keep their dtype: .half() would round the float32 statistics. A resident
        dense weight stays unless the layer moves."""
        before = dict(zip(self.packed_names, self.packed(), strict=True))
        resident, self.resident = self.resident, None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            if self._buffers[name].dtype != old.dtype:  # type: ignore[union-attr]
                self._buffers[name] = old.to(self._buffers[name].device)  # type: ignore[union-attr]
        if resident is not None and resident.device == self.packed()[0].device:
            self.resident = resident
        return self

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {self.scheme}"


def frozen_layers(model: nn.Module) -> list[FrozenLinear]:
    """The quantized layers of ``model``."""
    return [layer for layer in model.modules() if isinstance(layer, FrozenLinear)]


def resident_bytes(model: nn.Module) -> int:
    """Bytes of the dequantized weights that the frozen layers of ``model`` hold beside their codes."""
    return sum(layer.resident.nbytes for layer in frozen_layers(model) if layer.resident is not None)


def keep_dense(model: nn.Module, dequantize: str) -> None:
    """Sets how the frozen layers of ``model`` dequantize; per_use frees the dense weights that they hold."""
    for layer in frozen_layers(model):
        layer.dequantize = dequantize
        if dequantize != "resident":
            layer.resident = None


def dequantized(model: nn.Module) -> str | None:
    """How the frozen layers of ``model`` dequantize, resident or per_use; None where there are none."""
    layers = frozen_layers(model)
    if not layers:
        return None
    return "resident" if any(layer.dequantize == "resident" for layer in layers) else "per_use"

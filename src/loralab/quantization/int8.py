"""Weight-only int8, the same arithmetic in training and evaluation: by absmax, or by range and zero point."""

from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from loralab.numerics import absmax, affine
from loralab.quantization.base import Quantizer, check_block
from loralab.quantization.linear import FrozenLinear
from loralab.spec import Whole, spec


@spec("quantization")
class Int8Absmax(Quantizer):
    """W = codes * absmax / 127: one absmax per tensor, row (output feature) or block of consecutive weights."""

    granularity: absmax.Granularity = "row"
    block_size: Annotated[Whole, Ge(8), Le(65536)] = 64  # read where granularity is block
    packable = True

    @property
    def name(self) -> str:
        return "int8_absmax" + self.suffix

    @property
    def suffix(self) -> str:
        return "" if self.granularity == "row" else f"_{self.granularity}"

    @property
    def statistics_bits(self) -> int:
        """Bits per group: absmax in float32."""
        return 32

    def check(self, name: str, out_features: int, in_features: int) -> None:
        if self.granularity == "block":
            check_block(name, self.block_size, out_features, in_features)

    def storage_bits(self, out_features: int, in_features: int) -> int:
        n = out_features * in_features
        groups = {"tensor": 1, "row": out_features, "block": -(-n // self.block_size)}
        return 8 * n + self.statistics_bits * groups[self.granularity]

    def pack(self, weight: Tensor, bias: nn.Parameter | None) -> FrozenLinear:
        return Int8Linear(weight, bias, self)


@spec("quantization")
class Int8ZeroPoint(Int8Absmax):
    """W = (codes - zero) * scale: a group's range from minimum to maximum on all 255 codes; 8 bits more per group."""

    packable = True

    @property
    def name(self) -> str:
        return "int8_zeropoint" + self.suffix

    @property
    def statistics_bits(self) -> int:
        """Bits per group: scale in float32, zero in int8."""
        return 40


class Int8Linear(FrozenLinear):
    """codes (out, in) int8; absmax (groups,) float32, or scale (groups,) float32 and zero (groups,) int8."""

    codes: Tensor
    absmax: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, spec: Int8Absmax) -> None:
        super().__init__(weight, bias, spec.compute_dtype, spec.dequantize)
        self.granularity, self.block_size = spec.granularity, spec.block_size
        self.zero_point = isinstance(spec, Int8ZeroPoint)
        blocks = f", block_size={spec.block_size}" if spec.granularity == "block" else ""
        self.scheme = f"{spec.name} per {spec.granularity}{blocks}"
        if self.zero_point:
            codes, scale, zero = affine.quantize(weight, spec.granularity, spec.block_size)
            self.keep(codes=codes.clone(), scale=scale, zero=zero)  # codes may be a view of a padded tensor
        else:
            codes, group_absmax = absmax.quantize(weight, spec.granularity, spec.block_size)
            self.keep(codes=codes.clone(), absmax=group_absmax)

    def dense(self, dtype: torch.dtype) -> Tensor:
        groups = (self.granularity, self.block_size)
        if self.zero_point:
            return affine.dequantize(self.codes, self.scale, self.zero, *groups).to(dtype)
        return absmax.dequantize(self.codes, self.absmax, *groups).to(dtype)

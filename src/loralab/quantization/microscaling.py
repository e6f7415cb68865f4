"""MXFP4 and NVFP4: E2M1 values in blocks of 32 or 16 with 8-bit scales, to compare with the FP4 of QLoRA (table 2).

Products are those of the dequantized weight; tensor cores that multiply in these formats are not used.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from loralab.numerics import blockwise, microscaling
from loralab.quantization.base import Quantizer
from loralab.quantization.linear import FrozenLinear
from loralab.spec import spec

BLOCK = {"mxfp4": 32, "nvfp4": 16}


@spec("quantization")
class Microscaled(Quantizer):
    """Bits per weight, where in_features is a multiple of the block: mxfp4 4.25; nvfp4 4.5, and 32 bits per matrix."""

    format: Literal["mxfp4", "nvfp4"] = "nvfp4"
    packable = True

    @property
    def name(self) -> str:
        return self.format

    def storage_bits(self, out_features: int, in_features: int) -> int:
        blocks = out_features * -(-in_features // BLOCK[self.format])
        return 8 * -(-out_features * in_features // 2) + 8 * blocks + (32 if self.format == "nvfp4" else 0)

    def pack(self, weight: Tensor, bias: nn.Parameter | None) -> FrozenLinear:
        return MicroscaledLinear(weight, bias, self)


class MicroscaledLinear(FrozenLinear):
    """codes (ceil(out in / 2), 1) uint8; scales (out, ceil(in / block)): biased exponents uint8, or float8_e4m3fn and
    tensor_scale () float32."""

    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, spec: Microscaled) -> None:
        super().__init__(weight, bias, spec.compute_dtype, spec.dequantize)
        self.format = self.scheme = spec.format
        blocks = microscaling.in_blocks(weight, BLOCK[self.format])
        if self.format == "mxfp4":
            self.keep(scales=microscaling.mxfp4_scales(blocks))
        else:
            scales, tensor_scale = microscaling.nvfp4_scales(blocks)
            self.keep(scales=scales, tensor_scale=tensor_scale)
        codes = microscaling.scaled_codes(blocks, self._scales()).flatten(1)[:, : self.in_features]
        self.keep(codes=blockwise.pack_4bit(codes.flatten()))

    def levels(self) -> tuple[Tensor, int]:
        values = microscaling.e2m1_values(torch.arange(16, device=self.codes.device))
        codes = blockwise.unpack_4bit(self.codes, self.out_features * self.in_features)
        return values.argsort(stable=True).argsort()[codes.long()], 16

    def dense(self, dtype: torch.dtype) -> Tensor:
        codes = blockwise.unpack_4bit(self.codes, self.out_features * self.in_features)
        values = microscaling.e2m1_values(codes).view(self.out_features, self.in_features)
        blocks = microscaling.in_blocks(values, BLOCK[self.format])
        dense = (blocks * self._scales()[..., None]).flatten(1)[:, : self.in_features]
        return dense.to(dtype, memory_format=torch.contiguous_format)

    def _scales(self) -> Tensor:
        """(out, blocks) float32."""
        if self.format == "mxfp4":
            return microscaling.mxfp4_scale_values(self.scales)
        return self.scales.float() * self.tensor_scale

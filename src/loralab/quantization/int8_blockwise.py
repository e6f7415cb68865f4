"""bitsandbytes' block-wise int8: codes of the signed dynamic map, one absmax a block (Dettmers et al. 2022, "8-bit
Optimizers via Block-wise Quantization", arXiv 2110.02861, section 2); here for weights."""

from typing import Literal

import torch
from torch import Tensor, nn

from loralab.numerics import codebooks
from loralab.quantization import kernels
from loralab.quantization.base import Quantizer, check_block
from loralab.quantization.linear import FrozenLinear
from loralab.spec import spec


@spec("quantization")
class Int8Blockwise(Quantizer):
    """Bits per weight: 8 + 32 / block_size."""

    block_size: Literal[64, 128, 256, 512, 1024, 2048, 4096] = 256
    packable = True

    @property
    def name(self) -> str:
        return "int8_blockwise"

    def check(self, name: str, out_features: int, in_features: int) -> None:
        check_block(name, self.block_size, out_features, in_features)

    def storage_bits(self, out_features: int, in_features: int) -> int:
        n = out_features * in_features
        return 8 * n + 32 * -(-n // self.block_size)

    def pack(self, weight: Tensor, bias: nn.Parameter | None) -> FrozenLinear:
        return BlockwiseLinear(weight, bias, self)


class BlockwiseLinear(FrozenLinear):
    """codes (out, in) uint8, absmax (blocks,) float32; blocks are consecutive weights across rows."""

    codes: Tensor
    absmax: Tensor

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, spec: Int8Blockwise) -> None:
        super().__init__(weight, bias, spec.compute_dtype, spec.dequantize)
        self.block_size = spec.block_size
        self.scheme = f"int8 dynamic, block_size={spec.block_size}"
        codes, absmax = kernels.quantize_8bit(weight, spec.block_size)
        self.keep(codes=codes, absmax=absmax)

    def code_tables(self) -> list[Tensor]:
        return [codebooks.dynamic_map(self.codes.device)]

    def dense(self, dtype: torch.dtype) -> Tensor:
        return kernels.dequantize_8bit(self.codes, self.absmax, self.block_size, dtype)

"""NF4 and FP4 in blocks, statistics in float32 or quantized again (QLoRA, arXiv 2305.14314, section 3)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loralab.errors import ConfigError
from loralab.numerics import blockwise, codebooks
from loralab.quantization import kernels
from loralab.quantization.base import Quantizer, choose
from loralab.quantization.int8 import check_block
from loralab.quantization.linear import FrozenLinear

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
QUANT_TYPES = ("nf4", "fp4")


@dataclass(frozen=True)
class FourBit(Quantizer):
    """Bits per weight: 4 + 32 / block_size; with double_quant 4 + 8 / block_size + 32 / (256 block_size)."""

    quant_type: str = "nf4"
    block_size: int = 64
    double_quant: bool = False  # the absmax values in 8 bits, 256 to a second absmax

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("quant_type", self.quant_type, QUANT_TYPES)
        choose("block_size", self.block_size, BLOCK_SIZES)
        if not isinstance(self.double_quant, bool):
            raise ConfigError(
                f"quantization.double_quant = {self.double_quant!r} is no truth value; valid: true, false"
            )

    @property
    def name(self) -> str:
        return self.quant_type + ("_double" if self.double_quant else "")

    def check(self, name: str, out_features: int, in_features: int) -> None:
        check_block(name, self.block_size, out_features, in_features)

    def storage_bits(self, out_features: int, in_features: int) -> int:
        n = out_features * in_features
        blocks = -(-n // self.block_size)
        statistics = 32 * blocks
        if self.double_quant:  # one byte a block, its second absmax, the offset
            statistics = 8 * blocks + 32 * -(-blocks // blockwise.STATISTICS_BLOCK) + 32
        return 8 * -(-n // 2) + statistics

    def pack(self, weight: Tensor, bias: nn.Parameter | None) -> FrozenLinear:
        return FourBitLinear(weight, bias, self)


class FourBitLinear(FrozenLinear):
    """bitsandbytes' own bytes: codes (ceil(out in / 2), 1) uint8, absmax (blocks,) float32.

    Double: absmax (blocks,) uint8, second_absmax (ceil(blocks / 256),) float32, offset () float32.
    """

    codes: Tensor
    absmax: Tensor
    second_absmax: Tensor
    offset: Tensor

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, spec: FourBit) -> None:
        super().__init__(weight, bias, spec.compute_dtype, spec.dequantize)
        self.quant_type, self.block_size = spec.quant_type, spec.block_size
        self.double_quant = spec.double_quant
        self.scheme = f"{spec.quant_type}, block_size={spec.block_size}, double_quant={spec.double_quant}"
        codes, absmax = kernels.quantize_4bit(weight, spec.quant_type, spec.block_size)
        if not spec.double_quant:
            self.keep(codes=codes, absmax=absmax)
            return
        packed_absmax, second, offset = kernels.double_quantize(absmax)
        self.keep(codes=codes, absmax=packed_absmax, second_absmax=second, offset=offset)

    def code_tables(self) -> list[Tensor]:
        names = [self.quant_type, "dynamic"] if self.double_quant else [self.quant_type]
        return [codebooks.table(name, self.codes.device) for name in names]

    def dense(self, dtype: torch.dtype) -> Tensor:
        absmax = self.absmax
        if self.double_quant:
            absmax = kernels.undo_double_quantize(self.absmax, self.second_absmax, self.offset)
        shape = (self.out_features, self.in_features)
        return kernels.dequantize_4bit(self.codes, absmax, self.quant_type, self.block_size, shape, dtype)

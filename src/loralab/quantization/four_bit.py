"""4-bit code books in blocks, statistics in float32 or quantized again (QLoRA, arXiv 2305.14314, section 3)."""

from typing import Literal

import torch
from torch import Tensor, nn

from loralab.errors import ConfigError
from loralab.numerics import blockwise, codebooks
from loralab.numerics.absmax import Granularity
from loralab.quantization import kernels
from loralab.quantization.base import Quantizer, check_block
from loralab.quantization.linear import FrozenLinear
from loralab.spec import spec

STORAGE = {"uint8": torch.uint8, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@spec("quantization")
class FourBit(Quantizer):
    """Bits per weight: 4 + 32 / block_size; with double_quant 4 + 8 / block_size + 32 / (256 block_size).

    nf4 and fp4 are bitsandbytes'; e2m1 and e3m0 are the FP4 formats of QLoRA's table 2, which bitsandbytes' fp4 is
    not; int4 is absmax on an even grid.
    """

    quant_type: Literal["nf4", "fp4", "e2m1", "e3m0", "int4"] = "nf4"
    granularity: Granularity = "block"
    block_size: kernels.KernelBlock = 64  # read where granularity is block
    double_quant: bool = False  # the absmax values in 8 bits, 256 to a second absmax
    # dtype of the tensor that holds the packed bytes: sharding needs parameters of one dtype
    quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] = "uint8"
    packable = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.double_quant and self.granularity == "tensor":
            raise ConfigError(
                "quantization.double_quant=true quantizes many absmax values, and granularity=tensor has one; valid:"
                " granularity=block or row, or double_quant=false"
            )

    @property
    def name(self) -> str:
        """By the papers' names of the data types, such as ``int4_absmax``, ``fp4_e2m1``, ``nf4_double``."""
        names = {"int4": "int4_absmax", "e2m1": "fp4_e2m1", "e3m0": "fp4_e3m0"}
        granularity = "" if self.granularity == "block" else f"_{self.granularity}"
        return names.get(self.quant_type, self.quant_type) + granularity + ("_double" if self.double_quant else "")

    def block(self, out_features: int, in_features: int) -> int:
        """The number of weights that share one absmax: of a block, a row (in_features) or the tensor."""
        return {"block": self.block_size, "row": in_features, "tensor": out_features * in_features}[self.granularity]

    def check(self, name: str, out_features: int, in_features: int) -> None:
        check_block(name, self.block(out_features, in_features), out_features, in_features)
        packed, size = -(-out_features * in_features // 2), STORAGE[self.quant_storage].itemsize
        if packed % size:
            raise ConfigError(
                f"quantization.quant_storage={self.quant_storage}: the {packed} packed bytes of {name} are not a"
                f" multiple of its {size}; valid: uint8, or quantization.skip_modules=[{name}]"
            )

    def storage_bits(self, out_features: int, in_features: int) -> int:
        n = out_features * in_features
        blocks = -(-n // self.block(out_features, in_features))
        statistics = 32 * blocks
        if self.double_quant:  # absmax codes, second absmax, offset
            statistics = 8 * blocks + 32 * -(-blocks // blockwise.STATISTICS_BLOCK) + 32
        return 8 * -(-n // 2) + statistics

    def pack(self, weight: Tensor, bias: nn.Parameter | None) -> FrozenLinear:
        return FourBitLinear(weight, bias, self)


class FourBitLinear(FrozenLinear):
    """bitsandbytes' bytes: codes (ceil(out in / 2), 1) uint8, absmax (blocks,) float32.

    ``quant_storage`` is another dtype for the bytes of the codes. With double quantization absmax (blocks,) uint8,
    second_absmax (ceil(blocks / 256),) float32, offset () float32.
    """

    codes: Tensor
    absmax: Tensor
    second_absmax: Tensor
    offset: Tensor

    def __init__(
        self, weight: Tensor, bias: nn.Parameter | None, spec: FourBit, packed: dict[str, Tensor] | None = None
    ) -> None:
        """``packed``: the packed tensors of a quantized checkpoint; only shape and dtype of ``weight`` count then."""
        super().__init__(weight, bias, spec.compute_dtype, spec.dequantize)
        self.quant_type, self.block_size = spec.quant_type, spec.block(self.out_features, self.in_features)
        self.double_quant = spec.double_quant
        self.scheme = f"{spec.quant_type}, block_size={self.block_size}, double_quant={spec.double_quant}"
        self.keep(**(self._quantize(weight, spec) if packed is None else packed))

    def _quantize(self, weight: Tensor, spec: FourBit) -> dict[str, Tensor]:
        codes, absmax = kernels.quantize_4bit(weight, self.quant_type, self.block_size)
        if spec.quant_storage != "uint8":
            codes = codes.view(-1).view(STORAGE[spec.quant_storage])[:, None]
        if not spec.double_quant:
            return {"codes": codes, "absmax": absmax}
        packed_absmax, second, offset = kernels.double_quantize(absmax)
        return {"codes": codes, "absmax": packed_absmax, "second_absmax": second, "offset": offset}

    def code_tables(self) -> list[Tensor]:
        names = [self.quant_type, "dynamic"] if self.double_quant else [self.quant_type]
        return [codebooks.table(name, self.codes.device) for name in names]

    def levels(self) -> tuple[Tensor, int]:
        table = codebooks.table(self.quant_type, self.codes.device)
        codes = blockwise.unpack_4bit(self.codes.view(-1).view(torch.uint8), self.out_features * self.in_features)
        return table.argsort(stable=True).argsort()[codes.long()], len(table)

    def dense(self, dtype: torch.dtype) -> Tensor:
        absmax = self.absmax
        if self.double_quant:
            absmax = kernels.undo_double_quantize(self.absmax, self.second_absmax, self.offset)
        shape = (self.out_features, self.in_features)
        codes = self.codes if self.codes.dtype == torch.uint8 else self.codes.view(-1).view(torch.uint8)[:, None]
        return kernels.dequantize_4bit(codes, absmax, self.quant_type, self.block_size, shape, dtype)

"""int8 absmax, weight-only: W = codes * absmax / 127, the same arithmetic in training and evaluation."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loralab.errors import ConfigError
from loralab.numerics import absmax
from loralab.quantization.base import Quantizer, choose
from loralab.quantization.linear import FrozenLinear


@dataclass(frozen=True)
class Int8Absmax(Quantizer):
    """One float32 absmax per tensor, row (output feature) or block of ``block_size`` consecutive weights."""

    granularity: str = "row"
    block_size: int = 64  # read where granularity is block

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("granularity", self.granularity, absmax.GRANULARITIES)
        if isinstance(self.block_size, bool) or not 8 <= self.block_size <= 65536:
            raise ConfigError(f"quantization.block_size = {self.block_size!r} is out of range; valid: 8 to 65536")

    @property
    def name(self) -> str:
        return "int8_absmax"

    def check(self, name: str, out_features: int, in_features: int) -> None:
        if self.granularity == "block":
            check_block(name, self.block_size, out_features, in_features)

    def storage_bits(self, out_features: int, in_features: int) -> int:
        n = out_features * in_features
        groups = {"tensor": 1, "row": out_features, "block": -(-n // self.block_size)}
        return 8 * n + 32 * groups[self.granularity]

    def pack(self, weight: Tensor, bias: nn.Parameter | None) -> FrozenLinear:
        return Int8Linear(weight, bias, self)


def check_block(name: str, block_size: int, out_features: int, in_features: int) -> None:
    """A block larger than the layer would be a per-tensor scale under another name."""
    if block_size > out_features * in_features:
        raise ConfigError(
            f"quantization.block_size = {block_size} is larger than {name}, which has {out_features} x"
            f" {in_features}"
            f" = {out_features * in_features} weights; valid: at most that, or"
            f" quantization.skip_modules=[{name}]"
        )


class Int8Linear(FrozenLinear):
    """codes (out, in) int8, absmax (groups,) float32."""

    codes: Tensor
    absmax: Tensor

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, spec: Int8Absmax) -> None:
        super().__init__(weight, bias, spec.compute_dtype, spec.dequantize)
        self.granularity, self.block_size = spec.granularity, spec.block_size
        self.scheme = f"int8 absmax per {spec.granularity}" + (
            f", block_size={spec.block_size}" if spec.granularity == "block" else ""
        )
        codes, scale = absmax.quantize(weight, spec.granularity, spec.block_size)
        self.keep(codes=codes.clone(), absmax=scale)  # clone: codes may be a view of a padded tensor

    def dense(self, dtype: torch.dtype) -> Tensor:
        return absmax.dequantize(self.codes, self.absmax, self.granularity, self.block_size).to(dtype)

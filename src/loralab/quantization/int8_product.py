"""The int8 products of LLM.int8()'s table 1 (arXiv 2208.07339) as layers: activations are quantized too.

A scale "per tensor" and outlier columns are taken over the tokens of one sequence (s, in), as the paper has X, so that
neither padding nor other rows of the batch change a result. Decomposed products need the outlier columns of W in 16
bits, which depend on the input: the layers hold all of W in 16 bits beside its codes, and its bytes are counted (the
paper, which counts the columns in use, adds 0.1%).
"""

from typing import Literal

import torch
from torch import Tensor, nn

from loralab.numerics import int8_product
from loralab.quantization.base import Quantizer
from loralab.quantization.int8 import Int8Absmax, Int8Linear, Int8ZeroPoint
from loralab.quantization.linear import FrozenLinear
from loralab.quantization.sequences import SequenceLinear
from loralab.spec import NotNegative, spec


@spec("quantization")
class Int8Product(Quantizer):
    """For studies, not for speed. threshold 0: no decomposition. The gradient is straight through, dx = dy W."""

    granularity: Literal["tensor", "row", "vector"] = "vector"  # see numerics/int8_product.py
    zero_point: bool = False
    threshold: NotNegative = 0.0

    @property
    def name(self) -> str:
        kind = "zeropoint" if self.zero_point else "absmax"
        return f"int8_product_{kind}_{self.granularity}" + ("_decomposed" if self.threshold else "")

    @property
    def packable(self) -> bool:
        """False with scales per tensor or outlier columns: they are over whole sequences, which a pack may split."""
        return self.granularity != "tensor" and self.threshold == 0

    @property
    def weights(self) -> Int8Absmax:
        """The scheme in which W is stored."""
        kind = Int8ZeroPoint if self.zero_point else Int8Absmax
        return kind(
            self.skip_modules, self.compute_dtype, self.dequantize, int8_product.GRANULARITIES[self.granularity][1]
        )

    def storage_bits(self, out_features: int, in_features: int) -> int:
        decomposed = 16 * out_features * in_features if self.threshold else 0
        return self.weights.storage_bits(out_features, in_features) + decomposed

    def pack(self, weight: Tensor, bias: nn.Parameter | None) -> FrozenLinear:
        return Int8ProductLinear(weight, bias, self)


class Int8ProductLinear(Int8Linear, SequenceLinear):
    """Stored as Int8Linear, with a threshold also as ``weight_16`` (out, in); x is quantized in the product."""

    weight_16: Tensor

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, spec: Int8Product) -> None:
        super().__init__(weight, bias, spec.weights)
        self.spec = spec
        self.scheme = spec.name
        self.per_sequence = not spec.packable
        if spec.threshold:
            self.keep(weight_16=int8_product.in_16_bits(weight).clone())

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.unpacked(torch.float32)
        if self.per_sequence:
            y = self.sequences.each(x, self.out_features, lambda sequence: self._product(sequence, weight))
        else:
            y = self._product(x.reshape(-1, self.in_features), weight)
        y = y if bias is None else y + bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (n, in) -> (n, out) float32."""
        weight_16, spec = self.weight_16 if self.spec.threshold else None, self.spec
        return int8_product.product(x, weight, spec.granularity, spec.zero_point, spec.threshold, weight_16)

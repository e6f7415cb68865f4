"""LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339): int8 product, outlier columns in floating point.

    y = (codes(x) codes(W)^T) * absmax(x) absmax(W)^T / 127^2  +  x_O W_O^T  +  b
    O = columns of x with any |x| >= threshold

Scales are absmax, per row of W and per token of x. W_O is dequantized from int8, as in bitsandbytes; the paper's 16
bits for it are in ``int8_product/absmax_vector_decomposed``. O is taken over the tokens of one sequence, as the paper
has X, and not over a batch with its padding, as bitsandbytes' kernel does: with one row at a time the two are equal.
Training and evaluation compute this alike (bitsandbytes' layer does not: on CPUs it is weight-only and has no threshold
while training). The gradient is straight through: dx = dy W.
"""

import torch
from torch import Tensor, nn

from loralab.numerics import absmax
from loralab.quantization import kernels
from loralab.quantization.base import Quantizer
from loralab.quantization.linear import FrozenLinear
from loralab.quantization.sequences import SequenceLinear
from loralab.spec import NotNegative, spec


@spec("quantization")
class LLMInt8(Quantizer):
    """threshold 0 quantizes every column; 6.0 is the paper's."""

    threshold: NotNegative = 6.0

    @property
    def name(self) -> str:
        return "llm_int8"

    @property
    def packable(self) -> bool:
        """False with a threshold: outlier columns are over whole sequences, which a pack may split."""
        return self.threshold == 0

    def storage_bits(self, out_features: int, in_features: int) -> int:
        return 8 * out_features * in_features + 32 * out_features

    def pack(self, weight: Tensor, bias: nn.Parameter | None) -> FrozenLinear:
        return LLMInt8Linear(weight, bias, self)


class LLMInt8Linear(SequenceLinear):
    """codes (out, in) int8, absmax (out,) float32."""

    codes: Tensor
    absmax: Tensor

    def __init__(
        self, weight: Tensor, bias: nn.Parameter | None, spec: LLMInt8, packed: dict[str, Tensor] | None = None
    ) -> None:
        """``packed``: the packed tensors of a quantized checkpoint; of ``weight`` only shape and dtype are used then.
        Raises ConfigError without bitsandbytes."""
        super().__init__(weight, bias, spec.compute_dtype, spec.dequantize)
        self.threshold, self.per_sequence = spec.threshold, spec.threshold > 0
        self.scheme = f"LLM.int8(), threshold={spec.threshold}"
        if packed is None:
            packed = dict(zip(("codes", "absmax"), absmax.quantize(weight, "row"), strict=True))
        self.keep(**packed)
        kernels.bitsandbytes_ops()  # raises now where it is missing, not at the first step

    def dense(self, dtype: torch.dtype) -> Tensor:
        return absmax.dequantize(self.codes, self.absmax, "row").to(dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in) -> (..., out), scaled in float32.

        Not by bitsandbytes' int8_mm_dequant, which uses float16 on CUDA, and on CPU 6.200124e-5 for 1 / 127^2, which
        is 6.200012e-5.
        """
        y = self.sequences.each(x, self.out_features, self._product) if self.per_sequence else self._product(x)
        if bias is not None:
            y = y + bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor) -> Tensor:
        """x (..., in), with a threshold of one sequence -> (n, out) float32."""
        rows = x.reshape(-1, self.in_features)
        codes, scale, outliers = kernels.quantize_activations(rows, self.threshold)
        y = kernels.int8_product(codes, self.codes) * (scale[:, None] * (self.absmax / 127.0**2))
        if outliers is not None and outliers.numel():
            columns = absmax.dequantize(self.codes[:, outliers], self.absmax, "row").to(x.dtype)
            y += rows[:, outliers] @ columns.t()
        return y

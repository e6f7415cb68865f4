"""The int8 products of LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), table 1: x and W both quantized.

    y = deq(q(x_I)) deq(q(W))_I^T + x_O W_O^T      O: columns of x with any |x| >= threshold, I: the others

    granularity   x               W
    tensor        one scale       one scale
    row           one per token   one scale
    vector        one per token   one per output feature

each by absmax or by zero point. Scales are constant along the summed dimension, so the product of the
dequantized matrices is the int8 product rescaled, up to float rounding; integers need no kernel here. x_O and W_O are
in 16 bits (section 3.2). W is quantized once and whole, as it is loaded; only x says which of its columns are in O.
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from loralab.numerics import absmax, affine
from loralab.numerics.absmax import Granularity

GRANULARITIES: dict[str, tuple[Granularity, Granularity]] = {
    "tensor": ("tensor", "tensor"),
    "row": ("row", "tensor"),
    "vector": ("row", "row"),
}


def through_int8(matrix: Tensor, granularity: str, zero_point: bool) -> Tensor:
    """matrix (rows, in) -> quantized to int8 and back, (rows, in) float32."""
    if zero_point:
        return affine.dequantize(*affine.quantize(matrix, granularity), granularity)
    return absmax.dequantize(*absmax.quantize(matrix, granularity), granularity)


def in_16_bits(matrix: Tensor) -> Tensor:
    """``matrix`` in 16 bits: float16, or bfloat16 where the largest value is outside float16's range; or as it is."""
    if matrix.element_size() == 2:
        return matrix
    if isinstance(matrix, FakeTensor) or not matrix.numel():
        return matrix.half()
    limits = torch.finfo(torch.float16)
    return matrix.half() if limits.tiny <= float(matrix.abs().max()) <= limits.max else matrix.bfloat16()


def product(
    x: Tensor, weight: Tensor, granularity: str, zero_point: bool, threshold: float, weight_16: Tensor | None
) -> Tensor:
    """x (n, in), of one sequence; weight (out, in), dequantized -> y (n, out) float32.

    threshold 0: no column is an outlier. ``weight_16``: the weight (out, in) in 16 bits; None where threshold is 0.
    """
    outliers = (x.abs() >= threshold).any(dim=0) if threshold else None
    if outliers is None or weight_16 is None or isinstance(x, FakeTensor) or not bool(outliers.any()):
        return through_int8(x, GRANULARITIES[granularity][0], zero_point) @ weight.t()
    rest = through_int8(x.masked_fill(outliers, 0.0), GRANULARITIES[granularity][0], zero_point)
    return rest @ weight.t() + in_16_bits(x[:, outliers]).float() @ weight_16[:, outliers].float().t()

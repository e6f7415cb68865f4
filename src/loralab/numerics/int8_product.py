"""The int8 products of LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), table 1: x and W both quantized.

    y = deq(q(x_I)) deq(q(W_I))^T + x_O W_O^T      O: columns of x with any |x| >= threshold, I: the others

    granularity   x               W
    tensor        one scale       one scale
    row           one per token   one scale
    vector        one per token   one per output feature

each by absmax or by zero point. Scales are constant along the summed dimension, so the product of the
dequantized matrices is the int8 product rescaled, up to float rounding; integers need no kernel here. As in
bitsandbytes, W_O is what int8 kept of it.
"""

import torch
from torch import Tensor

from loralab.numerics import absmax, affine

GRANULARITIES = {"tensor": ("tensor", "tensor"), "row": ("row", "tensor"), "vector": ("row", "row")}


def through_int8(matrix: Tensor, granularity: str, zero_point: bool) -> Tensor:
    """(rows, in) -> the values that its int8 codes stand for, float32."""
    if zero_point:
        return affine.dequantize(*affine.quantize(matrix, granularity), granularity)
    return absmax.dequantize(*absmax.quantize(matrix, granularity), granularity)


def product(x: Tensor, weight: Tensor, granularity: str, zero_point: bool, threshold: float) -> Tensor:
    """x (n, in), weight (out, in) as dequantized -> (n, out) float32. threshold 0: no column is an outlier."""
    x = x.float()
    outliers = (x.abs() >= threshold).any(dim=0) if threshold else torch.zeros_like(x[0], dtype=torch.bool)
    rest = through_int8(x.masked_fill(outliers, 0.0), GRANULARITIES[granularity][0], zero_point)
    return (rest + x.masked_fill(~outliers, 0.0)) @ weight.t()

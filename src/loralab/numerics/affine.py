"""Asymmetric int8 by the range: the zero point moves [min w, max w] onto all 255 codes.

    scale_g = (max w - min w) / 254        over the group g, its range widened to hold 0
    zero_g  = -127 - round(min w / scale_g)
    codes_i = clamp(round(w_i / scale_g) + zero_g, -127, 127)
    w_i ~ (codes_i - zero_g) * scale_g

LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), section 2.1, "zeropoint quantization". 0 is stored exactly.
"""

import torch
from torch import Tensor

from loralab.numerics.absmax import TINY, groups

LEVELS = 254


def quantize(weight: Tensor, granularity: str = "row", block_size: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """weight (out, in), any float dtype -> codes (out, in) int8, scale (groups,) float32, zero (groups,) int8."""
    grouped = groups(weight.float(), granularity, block_size)
    low, high = grouped.amin(dim=1).clamp(max=0.0), grouped.amax(dim=1).clamp(min=0.0)
    scale = high / LEVELS - low / LEVELS  # not (high - low) / 254, which may overflow
    inverse = torch.where(scale > TINY, 1.0 / scale, 0.0)
    zero = -127.0 - torch.round(low * inverse)
    codes = (torch.round(grouped * inverse[:, None]) + zero[:, None]).clamp(-127, 127).to(torch.int8)
    return codes.reshape(-1)[: weight.numel()].view(weight.shape), scale, zero.to(torch.int8)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor, granularity: str = "row", block_size: int = 64) -> Tensor:
    """codes (out, in) int8, scale and zero (groups,) -> (out, in) float32."""
    grouped = groups(codes.short(), granularity, block_size)
    values = (grouped - zero.short()[:, None]) * scale[:, None]
    return values.reshape(-1)[: codes.numel()].view(codes.shape)

"""Symmetric int8 by the absolute maximum: one scale per tensor, per row, or per block of consecutive weights.

    absmax_g = max |w_i| over the group g
    codes_i = round(w_i * 127 / absmax_g)
    w_i ~ codes_i * absmax_g / 127

LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), section 2.1 for tensors, 3.1 ("vector-wise") for rows.
Per row, codes and absmax equal bitsandbytes' ``int8_vectorwise_quant`` at threshold 0 bit for bit (tested on
CPU); groups of zeros, where that kernel divides by zero, get the code 0 here.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

Granularity = Literal["tensor", "row", "block"]
GRANULARITIES = get_args(Granularity)
TINY = 1e-36  # below this, 127 / absmax is no longer a finite float32


def groups(matrix: Tensor, granularity: str, block_size: int) -> Tensor:
    """(out, in) -> (groups, group size). Blocks are consecutive weights across rows; the last is padded with zeros."""
    if granularity == "tensor":
        return matrix.reshape(1, -1)
    if granularity == "row":
        return matrix
    flat = matrix.reshape(-1)
    missing = -flat.numel() % block_size
    return torch.nn.functional.pad(flat, (0, missing)).view(-1, block_size)


def quantize(weight: Tensor, granularity: str = "row", block_size: int = 64) -> tuple[Tensor, Tensor]:
    """weight (out, in), any float dtype -> codes (out, in) int8 in [-127, 127], absmax (groups,) float32."""
    grouped = groups(weight.float(), granularity, block_size)
    absmax = grouped.abs().amax(dim=1)
    inverse = torch.where(absmax > TINY, 127.0 / absmax, 0.0)
    codes = torch.round(grouped * inverse[:, None]).to(torch.int8)
    return codes.reshape(-1)[: weight.numel()].view(weight.shape), absmax


def dequantize(codes: Tensor, absmax: Tensor, granularity: str = "row", block_size: int = 64) -> Tensor:
    """codes (out, in) int8, absmax (groups,) float32 -> (out, in) float32."""
    grouped = groups(codes, granularity, block_size) * (absmax / 127.0)[:, None]
    return grouped.reshape(-1)[: codes.numel()].view(codes.shape)

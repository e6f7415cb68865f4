"""FP4 E2M1 in short blocks with 8-bit scales: MXFP4 and NVFP4.

    MXFP4: w ~ 2^e_b E2M1(w / 2^e_b),           e_b = floor(log2(max |w_b|)) - 2, blocks of 32
    NVFP4: w ~ s_b t E2M1(w / (s_b t)),  s_b = E4M3(max |w_b| / (6 t)),  t = max |w| / (6 * 448), blocks of 16

MXFP4: OCP Microscaling Formats specification 1.0 (sections 5.2, 6.3). Its scale is a power of two (E8M0, bias 127), so
values above 6 times the scale are clipped to that. NVFP4: NVIDIA's, with another float32 scale t of the whole matrix.
Blocks lie within a row (along in_features); the last of a row may be shorter. Halves round to the even code.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

E2M1_MAX = 6.0
E4M3_MAX = 448.0
E2M1_EXPONENT = 2  # of the largest value, 6 = 1.5 * 2^2
E8M0_BIAS = 127
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def in_blocks(weight: Tensor, block_size: int) -> Tensor:
    """(out, in) -> (out, blocks of a row, block_size) float32, each row padded with zeros."""
    padded = pad(weight.float(), (0, -weight.shape[1] % block_size))
    return padded.view(weight.shape[0], -1, block_size)


def e2m1_codes(values: Tensor) -> Tensor:
    """values of any shape -> codes uint8 below 16: 8 for the sign bit plus the index of the nearest magnitude."""
    magnitudes = values.new_tensor(MAGNITUDES)
    halves = (magnitudes[:-1] + magnitudes[1:]) / 2
    absolute = values.abs().contiguous()
    lower, upper = torch.bucketize(absolute, halves), torch.bucketize(absolute, halves, right=True)
    index = torch.where(lower % 2 == 0, lower, upper)  # they differ half-way between two magnitudes
    return (index + 8 * torch.signbit(values)).to(torch.uint8)


def e2m1_values(codes: Tensor) -> Tensor:
    """codes of any shape -> values float32; code 8 is a negative zero."""
    magnitudes = torch.tensor(MAGNITUDES, device=codes.device)
    return torch.cat([magnitudes, -magnitudes])[codes.int()]


def mxfp4_scales(blocks: Tensor) -> Tensor:
    """(out, blocks, block_size) -> biased exponents (out, blocks) uint8; 0 for a block of zeros."""
    _, exponent = torch.frexp(blocks.abs().amax(-1))  # max = m 2^exponent with m in [0.5, 1)
    zero = blocks.abs().amax(-1) == 0
    biased = exponent - 1 - E2M1_EXPONENT + E8M0_BIAS
    return biased.masked_fill(zero, 0).clamp(0, 254).to(torch.uint8)  # 255 is nan


def mxfp4_scale_values(exponents: Tensor) -> Tensor:
    """Biased exponents uint8 of any shape -> powers of two float32."""
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents.int() - E8M0_BIAS)


def nvfp4_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(out, blocks, block_size) -> E4M3 scales (out, blocks) float8_e4m3fn, the matrix's scale () float32."""
    largest = blocks.abs().amax(-1)
    tensor_scale = largest.max() / (E2M1_MAX * E4M3_MAX)
    ratio = largest / E2M1_MAX / tensor_scale.clamp(min=torch.finfo(torch.float32).tiny)
    return ratio.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn), tensor_scale


def scaled_codes(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks (out, blocks, block_size), scales (out, blocks) float32 -> codes of the shape of ``blocks``; 0 where the
    scale is 0."""
    return e2m1_codes(torch.where(scales[..., None] > 0, blocks / scales[..., None], 0.0))

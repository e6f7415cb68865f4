"""Block-wise quantization by a code book, packing of 4-bit codes, double quantization of the statistics.

    absmax_b = max |w_i| over block b (block_size consecutive weights, row after row)
    codes_i = index of the code book value nearest to w_i / absmax_b
    w_i ~ code[codes_i] * absmax_b

QLoRA (arXiv 2305.14314) section 3. The bytes equal bitsandbytes', except that its 8-bit CPU kernel looks
the nearest code up in a table and may be off by 2^-15 of absmax.
"""

import torch
from torch import Tensor

from loralab.numerics.codebooks import dynamic_map

STATISTICS_BLOCK = 256  # QLoRA section 3, "Double Quantization"; the only size in bitsandbytes
SMALLEST = 1e-38  # keeps the reciprocal of an all-zero block finite


def quantize_blockwise(weight: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """weight, n elements of any shape; code book (k,) -> codes (n,) uint8, absmax (ceil(n / block_size),) float32."""
    flat = weight.reshape(-1).float()
    whole = flat.numel() - flat.numel() % block_size
    blocks, rest = flat[:whole].view(-1, block_size), flat[whole:]
    absmax = blocks.abs().amax(dim=1) if whole else flat.new_empty(0)
    scaled = (blocks * (1.0 / absmax.clamp(min=SMALLEST))[:, None]).reshape(-1)
    if rest.numel():  # a shorter last block; divided, not multiplied by the reciprocal, as bitsandbytes does
        last = rest.abs().max().clamp(min=SMALLEST)
        absmax, scaled = torch.cat([absmax, last[None]]), torch.cat([scaled, rest / last])
    return nearest_code(scaled.clamp(-1.0, 1.0), code), absmax


def nearest_code(values: Tensor, code: Tensor) -> Tensor:
    """values (n,) -> index (n,) uint8 of the nearest entry of ``code``; half-way goes to the lower value."""
    order = torch.argsort(code)
    ascending = code[order]
    return order[torch.bucketize(values, (ascending[:-1] + ascending[1:]) / 2)].to(torch.uint8)


def dequantize_blockwise(codes: Tensor, absmax: Tensor, code: Tensor, block_size: int) -> Tensor:
    """codes (n,) uint8, absmax (ceil(n / block_size),), code book (k,) -> values (n,) float32."""
    n = codes.numel()
    values = torch.nn.functional.pad(code[codes.int()], (0, -n % block_size))
    return (values.view(-1, block_size) * absmax[:, None]).view(-1)[:n]


def pack_4bit(codes: Tensor) -> Tensor:
    """codes (n,) uint8 below 16 -> (ceil(n / 2), 1) uint8, the first of a pair in the high 4 bits; an odd n is padded
    with a 0."""
    even = torch.nn.functional.pad(codes, (0, codes.numel() % 2))
    return (even[::2] << 4 | even[1::2])[:, None]


def unpack_4bit(packed: Tensor, n: int) -> Tensor:
    """(ceil(n / 2), 1) uint8 -> codes (n,) uint8."""
    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 0xF], dim=1).view(-1)[:n]


def double_quantize(absmax: Tensor, block_size: int = STATISTICS_BLOCK) -> tuple[Tensor, Tensor, Tensor]:
    """absmax (b,) -> codes (b,) uint8, second absmax (ceil(b / block_size),) float32, offset () float32.

    The offset, the mean, is subtracted first, as absmax is positive and the map symmetric. 32 / block_size bits per
    weight become 8 / block_size + 32 / (256 block_size): 0.5 -> 0.127 at block size 64.
    """
    offset = absmax.mean()
    codes, second = quantize_blockwise(absmax - offset, dynamic_map(absmax.device), block_size)
    return codes, second, offset


def undo_double_quantize(codes: Tensor, second: Tensor, offset: Tensor, block_size: int = STATISTICS_BLOCK) -> Tensor:
    """codes (b,), second absmax and offset of ``double_quantize`` -> absmax (b,) float32."""
    return dequantize_blockwise(codes, second, dynamic_map(codes.device), block_size) + offset

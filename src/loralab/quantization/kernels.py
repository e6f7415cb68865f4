"""The one door of this package to bitsandbytes: its functional kernels, and when not to use them."""

import logging
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from loralab.errors import ConfigError
from loralab.numerics import blockwise, codebooks

log = logging.getLogger(__name__)
KERNEL_TYPES = ("nf4", "fp4")
KernelBlock = Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]
KERNEL_BLOCKS = get_args(KernelBlock)
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def import_bitsandbytes() -> Any:
    """The package. Where the CPU has bf16 instructions it warns that an optional kernel from a hub is missing; loralab
    chooses its products itself (``gemm``), so that one line is kept from the log."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_not_the_hubs_kernel)
    import bitsandbytes

    return bitsandbytes


def _not_the_hubs_kernel(record: logging.LogRecord) -> bool:
    return "Failed to load CPU gemm_4bit_forward" not in str(record.msg)


def bitsandbytes_ops() -> Any:
    """``torch.ops.bitsandbytes``, after the import that registers them."""
    try:
        import_bitsandbytes()
    except ImportError as error:
        raise ConfigError(
            f"quantization: bitsandbytes cannot be imported ({error}); valid: pip install bitsandbytes, or"
            " quantization=none or int8_absmax, which do without it"
        ) from error
    return torch.ops.bitsandbytes


def quantize_4bit(weight: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    """weight, n elements -> packed (ceil(n / 2), 1) uint8, absmax (ceil(n / block_size),) float32.

    By the kernel for the types and block sizes that it has, else by the reference.
    """
    if quant_type not in KERNEL_TYPES or block_size not in KERNEL_BLOCKS:
        codes, absmax = blockwise.quantize_blockwise(weight, codebooks.table(quant_type, weight.device), block_size)
        return blockwise.pack_4bit(codes), absmax
    source = weight if weight.dtype in KERNEL_DTYPES else weight.float()
    packed, absmax = bitsandbytes_ops().quantize_4bit(source, block_size, quant_type, torch.uint8)
    return packed, absmax


def quantize_8bit(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """weight, n elements -> codes of the dynamic map, uint8 of its shape, absmax (ceil(n / block_size),) float32."""
    table = codebooks.dynamic_map(weight.device).clone()  # older CPU kernels write into it
    codes, absmax = bitsandbytes_ops().quantize_blockwise(weight.float(), table, block_size)
    return codes, absmax


def dequantize_8bit(codes: Tensor, absmax: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """-> values in the shape of ``codes``."""
    table = codebooks.dynamic_map(codes.device)
    kernel_dtype = dtype if dtype in KERNEL_DTYPES else torch.float32
    values: Tensor = bitsandbytes_ops().dequantize_blockwise(codes, absmax, table, block_size, kernel_dtype)
    return values.to(dtype)


def double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """absmax (b,) -> codes (b,) uint8, second absmax (ceil(b / 256),) float32, offset () float32."""
    offset = absmax.mean()
    return *quantize_8bit(absmax - offset, blockwise.STATISTICS_BLOCK), offset


def undo_double_quantize(codes: Tensor, second: Tensor, offset: Tensor) -> Tensor:
    """-> absmax (b,) float32."""
    return dequantize_8bit(codes, second, blockwise.STATISTICS_BLOCK, torch.float32) + offset


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, quant_type: str, block_size: int, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """-> (out, in) in ``dtype``: by the kernel where it is right for this width, else by the reference."""
    kernel_dtype = dtype if dtype in KERNEL_DTYPES else torch.float32
    fake = isinstance(packed, FakeTensor)  # has a shape and no values
    has_kernel = quant_type in KERNEL_TYPES and block_size in KERNEL_BLOCKS
    if has_kernel and (fake or kernel_is_right(quant_type, block_size, shape[1], kernel_dtype, packed.device)):
        dense = _kernel(packed, absmax, quant_type, block_size, shape, kernel_dtype)
    else:
        dense = _reference(packed, absmax, quant_type, block_size, shape)
    return dense.to(dtype)


def _kernel(
    packed: Tensor, absmax: Tensor, quant_type: str, block_size: int, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    dense: Tensor = bitsandbytes_ops().dequantize_4bit(packed, absmax, block_size, quant_type, shape, dtype)
    return dense


def _reference(packed: Tensor, absmax: Tensor, quant_type: str, block_size: int, shape: tuple[int, int]) -> Tensor:
    codes = blockwise.unpack_4bit(packed, shape[0] * shape[1])
    code = codebooks.table(quant_type, packed.device)
    return blockwise.dequantize_blockwise(codes, absmax, code, block_size).view(shape)


@cache
def kernel_is_right(quant_type: str, block_size: int, width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Ask the kernel itself, once per width: blocks run through the rows, and not every kernel follows.

    bitsandbytes 0.50.2 on CPUs with AVX-512 gives each row ``width // block_size`` whole blocks, silently,
    when ``width`` is a multiple of 16 but not of ``block_size`` (NF4 weight error 0.25 instead of 0.09 at 96
    x 64). On an AVX2 CPU it is right: widths 3 to 1376, every block size, both types, three dtypes. So it is
    tried out. Odd widths, and blocks of 2048 and 4096, go to the reference unasked: there bitsandbytes leaves
    its kernel for a torch.compile'd function, which costs seconds at first use and needs a compiler.
    """
    if device.type == "cpu" and (width % 2 or block_size >= 2048):
        return False
    rows = max(4, -(-4 * block_size // width))
    n = rows * width
    with torch.inference_mode(False), torch.no_grad():
        packed = (torch.arange((n + 1) // 2, device=device) * 73 % 256).to(torch.uint8)[:, None]
        blocks = rows * -(-width // block_size)  # room for a kernel that counts its blocks by rows
        absmax = torch.arange(1, blocks + 1, device=device).float()
        used = absmax[: -(-n // block_size)]
        got = _kernel(packed, absmax, quant_type, block_size, (rows, width), dtype)
        right = torch.equal(got, _reference(packed, used, quant_type, block_size, (rows, width)).to(dtype))
    if not right:
        log.info("bitsandbytes unpacks %s wrongly at width %d, block %d: bypassed", quant_type, width, block_size)
    return right


def quantize_activations(rows: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """rows (n, in) -> codes (n, in) int8, absmax (n,) float32, columns that hold a value >= threshold (or
    None).

    The CUDA kernel takes float16 only; the CPU one writes into its argument and back, hence the copy.
    """
    if isinstance(rows, FakeTensor):  # how many columns hold outliers depends on values
        threshold = 0.0
    source = rows.to(torch.float16, copy=True) if rows.is_cuda else rows.clone()
    codes, absmax, outliers = bitsandbytes_ops().int8_vectorwise_quant(source, threshold)
    return codes, absmax, outliers


def int8_product(codes: Tensor, weight: Tensor) -> Tensor:
    """codes (n, in) int8, weight (out, in) int8 -> (n, out) int32."""
    product: Tensor = bitsandbytes_ops().int8_linear_matmul(codes, weight)
    return product

"""The calls of bitsandbytes' kernels, and the cases in which the reference runs in their place."""

import logging
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial, wraps
from typing import Any, Literal, get_args
from unittest.mock import patch

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
    """The module bitsandbytes, imported. On CPUs with bf16 instructions it warns that an optional kernel from a hub is
    missing; that warning is suppressed, as loralab does not use the kernel (``gemm``). Raises ImportError, also where
    there is a CUDA device and bitsandbytes has no binary for torch's CUDA: then none of its kernels run, nor on a CPU.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_no_hub_warning)
    first = "bitsandbytes" not in sys.modules  # later imports cost nothing, and torch stays as it is
    with patch.object(torch, "compile", _compiled_when_called) if first else nullcontext():
        import bitsandbytes

    if not bitsandbytes.cextension.lib.compiled_with_cuda and torch.cuda.is_available():
        raise ImportError(
            f"it has no binary for CUDA {torch.version.cuda}, which this torch is built for; python -m bitsandbytes "
            "says which one it looked for"
        )
    return bitsandbytes


def _compiled_when_called(function: Any = None, **options: Any) -> Any:
    """``torch.compile``, called no sooner than the function is: it imports a compiler, in a second, for functions of
    bitsandbytes that run where there are no kernels."""
    if function is None:
        return partial(_compiled_when_called, **options)
    compiled: Callable[[], Any] = cache(lambda: torch.compile(function, **options))
    return wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))


def _is_no_hub_warning(record: logging.LogRecord) -> bool:
    return "Failed to load CPU gemm_4bit_forward" not in str(record.msg)


def bitsandbytes_ops() -> Any:
    """``torch.ops.bitsandbytes``, which the import registers; ConfigError where bitsandbytes cannot be imported."""
    try:
        import_bitsandbytes()
    except ImportError as error:
        raise ConfigError(
            f"quantization: bitsandbytes cannot be imported ({error}); valid: pip install bitsandbytes, or"
            " quantization=none or int8_absmax, which do not need it"
        ) from error
    return torch.ops.bitsandbytes


def quantize_4bit(weight: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    """weight, n elements -> packed (ceil(n / 2), 1) uint8, absmax (ceil(n / block_size),) float32.

    By the kernel for its types and block sizes, else by the reference.
    """
    if quant_type not in KERNEL_TYPES or block_size not in KERNEL_BLOCKS:
        codes, absmax = blockwise.quantize_blockwise(weight, codebooks.table(quant_type, weight.device), block_size)
        return blockwise.pack_4bit(codes), absmax
    source = weight if weight.dtype in KERNEL_DTYPES else weight.float()
    packed, absmax = bitsandbytes_ops().quantize_4bit(source, block_size, quant_type, torch.uint8)
    return packed, absmax


def quantize_8bit(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """weight, n elements -> codes of the dynamic map, uint8 in the weight's shape, absmax (ceil(n / block_size),)
    float32."""
    table = codebooks.dynamic_map(weight.device).clone()  # older CPU kernels write into it
    codes, absmax = bitsandbytes_ops().quantize_blockwise(weight.float(), table, block_size)
    return codes, absmax


def dequantize_8bit(codes: Tensor, absmax: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """codes and absmax of ``quantize_8bit`` -> values in the shape of ``codes``, in ``dtype``."""
    table = codebooks.dynamic_map(codes.device)
    kernel_dtype = dtype if dtype in KERNEL_DTYPES else torch.float32
    values: Tensor = bitsandbytes_ops().dequantize_blockwise(codes, absmax, table, block_size, kernel_dtype)
    return values.to(dtype)


def double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """absmax (b,) -> codes (b,) uint8, second absmax (ceil(b / 256),) float32, offset () float32."""
    offset = absmax.mean()
    return *quantize_8bit(absmax - offset, blockwise.STATISTICS_BLOCK), offset


def undo_double_quantize(codes: Tensor, second: Tensor, offset: Tensor) -> Tensor:
    """What ``double_quantize`` returned -> absmax (b,) float32."""
    return dequantize_8bit(codes, second, blockwise.STATISTICS_BLOCK, torch.float32) + offset


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, quant_type: str, block_size: int, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """packed and absmax of ``quantize_4bit`` -> (out, in) in ``dtype``: by the kernel where it is correct, else by the
    reference."""
    kernel_dtype = dtype if dtype in KERNEL_DTYPES else torch.float32
    fake = isinstance(packed, FakeTensor)  # no values to compare
    has_kernel = quant_type in KERNEL_TYPES and block_size in KERNEL_BLOCKS
    if has_kernel and (fake or kernel_is_correct(quant_type, block_size, shape[1], kernel_dtype, packed.device)):
        dense = _kernel(packed, absmax, quant_type, block_size, shape, kernel_dtype)
    else:
        dense = _reference(packed, absmax, quant_type, block_size, shape)
    return dense.to(dtype)


def _kernel(
    packed: Tensor, absmax: Tensor, quant_type: str, block_size: int, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    # imported by who made the layer: the import is nothing that torch.compile could trace
    dense: Tensor = torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, block_size, quant_type, shape, dtype)
    return dense


def _reference(packed: Tensor, absmax: Tensor, quant_type: str, block_size: int, shape: tuple[int, int]) -> Tensor:
    codes = blockwise.unpack_4bit(packed, shape[0] * shape[1])
    code = codebooks.table(quant_type, packed.device)
    return blockwise.dequantize_blockwise(codes, absmax, code, block_size).view(shape)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def kernel_is_correct(quant_type: str, block_size: int, width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """``tried``, of which a compiled graph takes the answer: torch.compile traces through a cache."""
    return tried(quant_type, block_size, width, dtype, device)


@cache
def tried(quant_type: str, block_size: int, width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the 4-bit kernel dequantizes rows of ``width`` to the bits of the reference; tried once per width.

    Blocks run on across rows. bitsandbytes 0.50.2 on CPUs with AVX-512 silently gives each row ``width //
    block_size`` whole blocks where ``width`` is a multiple of 16 but not of ``block_size`` (NF4 weight error 0.25
    instead of 0.09 at 96 x 64). On an AVX2 CPU it is correct: widths 3 to 1376, every block size, both types, three
    dtypes. Odd widths and blocks of 2048 and 4096 are not tried on a CPU and get the reference: bitsandbytes runs a
    torch.compile'd function there, which takes seconds at first use and needs a compiler.
    """
    if device.type == "cpu" and (width % 2 or block_size >= 2048):
        return False
    rows = max(4, -(-4 * block_size // width))
    n = rows * width
    with torch.inference_mode(False), torch.no_grad():
        packed = (torch.arange((n + 1) // 2, device=device) * 73 % 256).to(torch.uint8)[:, None]
        blocks = rows * -(-width // block_size)  # enough for a kernel that has its blocks by row
        absmax = torch.arange(1, blocks + 1, device=device).float()
        dense = _kernel(packed, absmax, quant_type, block_size, (rows, width), dtype)
        expected = _reference(packed, absmax[: -(-n // block_size)], quant_type, block_size, (rows, width)).to(dtype)
    if not (correct := torch.equal(dense, expected)):
        log.info(
            "bitsandbytes dequantizes %s wrongly at in_features=%d, block_size=%d: loralab's own reference runs in its "
            "place",
            *(quant_type, width, block_size),
        )
    return correct


def quantize_activations(rows: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """rows (n, in) -> codes (n, in) int8, absmax (n,) float32, indices of the columns with a value >= threshold or
    None.

    The CUDA kernel takes float16 only; the CPU kernel writes into its argument, hence the copy.
    """
    if isinstance(rows, FakeTensor):  # the number of outlier columns depends on values
        threshold = 0.0
    source = rows.to(torch.float16, copy=True) if rows.is_cuda else rows.clone()
    codes, absmax, outliers = bitsandbytes_ops().int8_vectorwise_quant(source, threshold)
    return codes, absmax, outliers


def int8_product(codes: Tensor, weight: Tensor) -> Tensor:
    """codes (n, in) int8, weight (out, in) int8 -> (n, out) int32."""
    product: Tensor = bitsandbytes_ops().int8_linear_matmul(codes, weight)
    return product

"""Products with a frozen weight, by torch's default library or by oneDNN where it is much faster and as exact.

On some AMD CPUs with AVX-512 oneDNN multiplies float32 twice as fast as MKL, torch's default; on others they are equal.
A probe, once per process, decides. It compares with float64, so that no lower precision passes, and requires that a
row's bits do not depend on the number of rows, which packs rely on.
"""

import time
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

SHAPES = ((256, 384, 1024), (256, 1024, 384))  # rows, in, out
ROWS = (4, 5, 17, 64, 100)  # numbers of rows that must give the same bits
MIN_SPEEDUP = 1.4  # of oneDNN; less may be the noise of a busy CPU
MAX_ERROR = 1e-6  # relative to float64; float32 sums of this length have 2e-7 to 4e-7, bfloat16 3e-3


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in) times weight (out, in) transposed, plus bias (out,). No graph is recorded."""
    return (
        _onednn(x, weight, bias) if _is_cpu_float32(x) and product_library() == "onednn" else F.linear(x, weight, bias)
    )


def backward(dy: Tensor, weight: Tensor) -> Tensor:
    """dy (..., out) times weight (out, in)."""
    return _onednn(dy, weight.t(), None) if _is_cpu_float32(dy) and product_library() == "onednn" else dy @ weight


def _is_cpu_float32(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and not isinstance(x, FakeTensor)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    return product


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def product_library() -> str:
    """``chosen``, of which a compiled graph takes the answer: torch.compile traces through a cache."""
    return chosen()


@cache
def chosen() -> str:
    """ "torch" or "onednn", the library for float32 products on this CPU; the first call runs the probe."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):  # type: ignore[no-untyped-call]
        return "torch"
    with torch.inference_mode(False), torch.no_grad():
        return "onednn" if all(_onednn_is_better(*shape) for shape in SHAPES) else "torch"


def _onednn_is_better(rows: int, width: int, out: int) -> bool:
    """Whether oneDNN is exact and faster by MIN_SPEEDUP for x (rows, width) and weight (out, width)."""
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, width, generator=random), torch.randn(out, width, generator=random)
    exact = x.double() @ weight.double().t()
    product = _onednn(x, weight, None)
    if float((product - exact).norm() / exact.norm()) > MAX_ERROR:
        return False
    if any(not torch.equal(_onednn(x[:n], weight, None), product[:n]) for n in ROWS):
        return False
    onednn, default = _seconds(lambda: _onednn(x, weight, None)), _seconds(lambda: F.linear(x, weight))
    return default > MIN_SPEEDUP * onednn


def _seconds(product: Callable[[], Tensor]) -> float:
    """The shortest time of seven calls, after one to warm up."""
    product()
    times = []
    for _ in range(7):
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
    return min(times)

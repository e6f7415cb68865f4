"""Which library multiplies by a frozen weight: torch's own choice, or oneDNN where that is clearly faster and as exact.

On some AMD CPUs with AVX-512 oneDNN multiplies float32 twice as fast as MKL, which torch takes; on others they are
equal. So it is tried out once a process. A lower precision is never taken for a higher one: the probe compares with
float64, and asks that a row has the same bits whatever number of rows is multiplied, which packs rely on.
"""

import time
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

SHAPES = ((256, 384, 1024), (256, 1024, 384))  # rows, in, out
ROWS = (4, 5, 17, 64, 100)
GAIN = 1.4  # how many times faster it must be: a choice shall not hang on a busy moment
ERROR = 1e-6  # relative to float64; float32 sums of this length have 2e-7 to 4e-7, bfloat16 3e-3


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in) times weight (out, in) transposed, plus bias (out,). No graph is recorded."""
    return _onednn(x, weight, bias) if _suits(x) and chosen() == "onednn" else F.linear(x, weight, bias)


def backward(dy: Tensor, weight: Tensor) -> Tensor:
    """dy (..., out) times weight (out, in)."""
    return _onednn(dy, weight.t(), None) if _suits(dy) and chosen() == "onednn" else dy @ weight


def _suits(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and not isinstance(x, FakeTensor)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    return product


@cache
def chosen() -> str:
    """torch or onednn, for float32 on this CPU."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):  # type: ignore[no-untyped-call]
        return "torch"
    with torch.inference_mode(False), torch.no_grad():
        return "onednn" if all(_better(*shape) for shape in SHAPES) else "torch"


def _better(rows: int, width: int, out: int) -> bool:
    drawn = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, width, generator=drawn), torch.randn(out, width, generator=drawn)
    exact = x.double() @ weight.double().t()
    product = _onednn(x, weight, None)
    if float((product - exact).norm() / exact.norm()) > ERROR:
        return False
    if any(not torch.equal(_onednn(x[:n], weight, None), product[:n]) for n in ROWS):
        return False
    ours, theirs = _seconds(lambda: _onednn(x, weight, None)), _seconds(lambda: F.linear(x, weight))
    return theirs > GAIN * ours


def _seconds(product: Callable[[], Tensor]) -> float:
    """The shortest of several, after one to warm up."""
    product()
    times = []
    for _ in range(7):
        begun = time.perf_counter()
        product()
        times.append(time.perf_counter() - begun)
    return min(times)

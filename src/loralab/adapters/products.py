"""The products of LoRA over a run of parts, each with a matrix of its own: part by part, or of all at once.

A matrix product of a part is a launch, and sixteen trials of a pass make sixteen of each. ``Batched`` and ``Ragged``
make one of them, whatever the number of parts. A part's rows meet no other part's matrix in any form, so that what is
not finite in one stays there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from loralab.numerics.shadows import ALIGNED, in_dtype
from loralab.numerics.stacks import sent, stacked

Matrices = Sequence[Tensor] | Tensor  # one for each part, (rows, columns); or a stack of them
OF_A, OF_B = 0, 1  # the dimension of A (r, in), of B (out, r) that is the rank
# what grouped_mm multiplies without the host (on CUDA others go through a loop that reads the offsets back)
GROUPED = {"cuda": (torch.bfloat16,), "cpu": (torch.float32, torch.bfloat16, torch.float16)}


@dataclass(frozen=True)
class OneByOne:
    """A product for each part. ``sizes``: rows of each part."""

    sizes: tuple[int, ...]

    def joined(self, matrices: Sequence[Tensor], dtype: torch.dtype, rank: int) -> Matrices:
        """The parts' matrices in ``dtype``, as the other methods take them; ``rank``: OF_A or OF_B."""
        return [in_dtype(matrix, dtype, [matrix]) for matrix in matrices]

    def turned(self, matrices: Matrices) -> Matrices:
        """The matrices transposed."""
        return [matrix.t() for matrix in matrices]

    def times(self, x: Tensor, matrices: Matrices, out: Tensor | None = None) -> Tensor:
        """x (rows, n), each part's rows times its matrix (n, m); written to ``out`` (rows, m) where that is given."""
        if len(self.sizes) == 1:
            return torch.mm(x, matrices[0]) if out is None else torch.mm(x, matrices[0], out=out)
        made = x.new_empty(len(x), matrices[0].shape[1]) if out is None else out
        for own, matrix, into in zip(self.split(x), matrices, self.split(made), strict=True):
            torch.mm(own, matrix, out=into)
        return made

    def add(self, y: Tensor, h: Tensor, matrices: Matrices) -> None:
        """Adds ``times(h, matrices)`` to y (rows, m)."""
        for own, inner, matrix in zip(self.split(y), self.split(h), matrices, strict=True):
            own.addmm_(inner, matrix)

    def outer(self, left: Tensor, right: Tensor) -> Matrices:
        """For each part left^T right of its rows."""
        return [torch.mm(a.t(), b) for a, b in zip(self.split(left), self.split(right), strict=True)]

    def cut(self, matrices: Matrices, dtype: torch.dtype, rank: int, r: int) -> Matrices:
        """The matrices in ``dtype``, and of rank ``r`` where they were filled up."""
        return [as_dtype(matrix, dtype) for matrix in matrices]

    def scale(self, h: Tensor, scalings: Sequence[float]) -> None:
        """Multiplies each part's rows of h (rows, r) by its scaling."""
        if len(set(scalings)) == 1:
            if scalings[0] != 1.0:
                h.mul_(scalings[0])
            return
        h.mul_(self._column(h, tuple(scalings)))

    def split(self, flat: Tensor) -> Sequence[Tensor]:
        """Each part's rows of ``flat``."""
        views: Sequence[Tensor] = (flat,) if len(self.sizes) == 1 else flat.split_with_sizes(list(self.sizes))
        return views

    def _column(self, h: Tensor, scalings: tuple[float, ...]) -> Tensor:
        dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
        if isinstance(h, FakeTensor):  # which must not be kept for the real ones
            return h.new_empty(len(h), 1, dtype=dtype)
        return _repeated(scalings, self.sizes, dtype, h.device)


@dataclass(frozen=True)
class Batched(OneByOne):
    """One batched product, of parts that have equally many rows."""

    def joined(self, matrices: Sequence[Tensor], dtype: torch.dtype, rank: int) -> Matrices:
        return in_dtype(stacked(matrices), dtype, matrices)

    def turned(self, matrices: Matrices) -> Matrices:
        return matrices.transpose(1, 2) if isinstance(matrices, Tensor) else super().turned(matrices)

    def times(self, x: Tensor, matrices: Matrices, out: Tensor | None = None) -> Tensor:
        assert isinstance(matrices, Tensor)
        if out is None:
            return torch.bmm(self._by_part(x), matrices).view(len(x), -1)
        torch.bmm(self._by_part(x), matrices, out=self._by_part(out))
        return out

    def add(self, y: Tensor, h: Tensor, matrices: Matrices) -> None:
        assert isinstance(matrices, Tensor)
        self._by_part(y).baddbmm_(self._by_part(h), matrices)

    def outer(self, left: Tensor, right: Tensor) -> Matrices:
        return torch.bmm(self._by_part(left).transpose(1, 2), self._by_part(right))

    def cut(self, matrices: Matrices, dtype: torch.dtype, rank: int, r: int) -> Matrices:
        assert isinstance(matrices, Tensor)
        return as_dtype(matrices.narrow(1 + rank, 0, r), dtype).contiguous()

    def _by_part(self, flat: Tensor) -> Tensor:
        return flat.view(len(self.sizes), -1, flat.shape[-1])


@dataclass(frozen=True)
class Ragged(Batched):
    """One grouped product, whatever the parts' numbers of rows. Ranks are filled up with zeros to what its strides
    need."""

    def joined(self, matrices: Sequence[Tensor], dtype: torch.dtype, rank: int) -> Matrices:
        joined = in_dtype(stacked(matrices), dtype, matrices)
        missing = -matrices[0].shape[rank] % (ALIGNED // joined.element_size())
        return F.pad(joined, (0, 0, 0, missing) if rank == OF_A else (0, missing)) if missing else joined

    def times(self, x: Tensor, matrices: Matrices, out: Tensor | None = None) -> Tensor:
        assert isinstance(matrices, Tensor)
        made = self._grouped(x, matrices, (len(x), matrices.shape[2]))
        return made if out is None else out.copy_(made)

    def add(self, y: Tensor, h: Tensor, matrices: Matrices) -> None:
        y.add_(self.times(h, matrices))

    def outer(self, left: Tensor, right: Tensor) -> Matrices:
        return self._grouped(left.t(), right, (len(self.sizes), left.shape[1], right.shape[1]))

    def _grouped(self, left: Tensor, right: Tensor, shape: tuple[int, ...]) -> Tensor:
        if isinstance(left, FakeTensor):  # whose own form knows bfloat16 alone
            return left.new_empty(shape)
        product: Tensor = F.grouped_mm(left, right, offs=_ends(self.sizes, left.device))
        return product


def form_for(sizes: tuple[int, ...], a: Tensor, b: Tensor, dtype: torch.dtype) -> OneByOne:
    """The form with the fewest operations for parts of ``sizes`` rows with factors such as A (r, in) and B (out, r),
    computed in ``dtype``."""
    if len(sizes) == 1:
        return OneByOne(sizes)
    if len(set(sizes)) == 1:
        return Batched(sizes)
    unit = ALIGNED // dtype.itemsize
    aligned = a.shape[1] % unit == 0 and b.shape[0] % unit == 0
    return (Ragged if aligned and dtype in GROUPED.get(a.device.type, ()) else OneByOne)(sizes)


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``. Where it has it already, asking is a tenth of the cost of torch's own no-op."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def products_dtype(x: Tensor, factors: Sequence[Tensor]) -> torch.dtype:
    """In which the factors meet x: autocast's, where it is on, else their own."""
    own = factors[0].dtype
    cast = torch.is_autocast_enabled(x.device.type) and own != torch.float64
    return torch.get_autocast_dtype(x.device.type) if cast else own


@lru_cache(maxsize=64)  # all layers of a pass ask for the same ones
def _ends(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each part ends."""
    return sent(torch.tensor(sizes).cumsum(0).to(torch.int32), device)


@lru_cache(maxsize=64)
def _repeated(values: tuple[float, ...], sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, 1): the value of the part that a row belongs to."""
    return sent(torch.tensor(values, dtype=dtype).repeat_interleave(torch.tensor(sizes))[:, None], device)

"""Directions of a weight update: its spectrum, how far it lies along those of W, and along those of another update.

Matrices are (out, in), as in W x. Singular vectors are columns: ``left`` (out, n), ``right`` (in, n).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SINGLE = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Spectrum:
    """The singular values (n,), largest first, that are not 0 up to rounding, and their vectors."""

    left: Tensor
    values: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        return len(self.values)

    @property
    def frobenius(self) -> float:
        return float(self.values.square().sum().sqrt())

    @property
    def spectral(self) -> float:
        return float(self.values[0]) if self.rank else 0.0


def spectrum(matrix: Tensor, rounding: float = 0.0) -> Spectrum:
    """Of a whole matrix, by its singular value decomposition. Values up to ``rounding`` count as 0, and so do those
    below the largest one by the precision of ``matrix`` times its larger side."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return _without_zeros(left, values, right.mT, rounding)


def product_spectrum(left: Tensor, right: Tensor) -> Spectrum:
    """Of ``left`` (out, r) @ ``right`` (r, in), in float64 from the QR decompositions of both: never of an out x in
    matrix where r is smaller. Values that a rounding of the factors to float32 could make count as 0."""
    left, right = left.double(), right.double()
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.mT)
    inner, values, outer = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    rounding = SINGLE * float(torch.linalg.matrix_norm(left) * torch.linalg.matrix_norm(right))
    return _without_zeros(q_left @ inner, values, q_right @ outer.mT, rounding)


def _without_zeros(left: Tensor, values: Tensor, right: Tensor, rounding: float) -> Spectrum:
    relative = torch.finfo(values.dtype).eps * max(len(left), len(right))
    floor = max(rounding, relative * float(values[0])) if len(values) else 0.0
    rank = int((values > floor).sum())
    return Spectrum(left[:, :rank], values[:rank], right[:, :rank])


def effective_rank(values: Tensor) -> float | None:
    """exp of the entropy of the singular values divided by their sum (Roy and Vetterli 2007, "The effective rank",
    definition 1): n where n values are equal. None where there is no value other than 0."""
    if not len(values):
        return None
    shares = values.double() / values.double().sum()
    return math.exp(float(torch.special.entr(shares).sum()))


def stable_rank(values: Tensor) -> float | None:
    """||.||_F^2 / ||.||_2^2, at most the rank. None where there is no value other than 0."""
    return float((values.double() / values[0].double()).square().sum()) if len(values) else None


def projected(weight: Tensor, left: Tensor, right: Tensor) -> float:
    """||U^T W V||_F with U = ``left`` and V = ``right``: how much of W lies along these directions (LoRA, arXiv
    2106.09685, section 7.3, table 7, which writes V for our V^T)."""
    return float(torch.linalg.matrix_norm(left.to(weight.dtype).mT @ weight @ right.to(weight.dtype)))


def projected_at_random(frobenius: float, directions: int, shape: tuple[int, int]) -> float:
    """The same for ``directions`` random orthonormal columns on each side, W of ``shape`` having this norm: the root of
    the mean square, ||W||_F r / sqrt(out in)."""
    return frobenius * directions / math.sqrt(shape[0] * shape[1])


def largest_cosines(tuned: Tensor, base: Tensor) -> Tensor:
    """Of each column of ``tuned`` (out, k) the largest |cosine| with a column of ``base`` (out, n): (k,).

    With left singular vectors of W + Delta W and of W, those below epsilon are the intruder dimensions (Shuttleworth et
    al. 2024, arXiv 2410.21228, definition 1 and algorithm 1, whose code takes absolute values and left vectors).
    """
    return (tuned.mT @ base).abs().amax(1)


def similarity(first: Tensor, second: Tensor) -> Tensor:
    """phi(i, j) = ||U_i^T V_j||_F^2 / min(i, j) in [0, 1] of the first i columns of ``first`` (n, p) and the first j of
    ``second`` (n, q), orthonormal: (p, q), whose entry [i - 1, j - 1] it is (LoRA, section 7.2, equation 4)."""
    squares = (first.double().mT @ second.double()).square()
    rows = torch.arange(1, len(squares) + 1)[:, None]
    columns = torch.arange(1, squares.shape[1] + 1)
    return squares.cumsum(0).cumsum(1) / torch.minimum(rows, columns)


def similarity_at_random(i: int, j: int, n: int) -> float:
    """The mean of phi(i, j) over random subspaces of n dimensions: i j / (n min(i, j)) = max(i, j) / n."""
    return max(i, j) / n

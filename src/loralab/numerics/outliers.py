"""Synthetic weights with and without outliers, and what counts as one."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

SIGMA = 0.02  # a common initialization; relative errors do not depend on it
NORMAL_MEDIAN = 0.6744897501960817  # median |z| of N(0, 1)


def gauss(shape: tuple[int, int], random: Generator) -> Tensor:
    """N(0, SIGMA^2)."""
    return SIGMA * torch.randn(shape, generator=random)


def student_t4(shape: tuple[int, int], random: Generator) -> Tensor:
    """Student's t with 4 degrees of freedom, z / sqrt(chi2_4 / 4), scaled to variance SIGMA^2: heavy tails."""
    chi2 = torch.stack([torch.randn(shape, generator=random).square() for _ in range(4)]).sum(dim=0)
    return gauss(shape, random) / (chi2 / 4).sqrt() / 2**0.5


def one_outlier(shape: tuple[int, int], random: Generator) -> Tensor:
    """Gaussian but for a single weight of 200 SIGMA."""
    weight = gauss(shape, random)
    weight[shape[0] // 2, shape[1] // 2] = 200 * SIGMA
    return weight


def sparse_outliers(shape: tuple[int, int], random: Generator) -> Tensor:
    """Gaussian, one weight in a thousand times 20."""
    weight = gauss(shape, random)
    return torch.where(torch.rand(shape, generator=random) < 0.001, 20 * weight, weight)


def outlier_columns(shape: tuple[int, int], random: Generator) -> Tensor:
    """Gaussian, 8 input features times 20: the form that activations' outlier features take (LLM.int8(), section 4)."""
    weight = gauss(shape, random)
    weight[:, torch.randperm(shape[1], generator=random)[:8]] *= 20
    return weight


SYNTHETIC: dict[str, Callable[[tuple[int, int], Generator], Tensor]] = {
    "gauss": gauss,
    "one_outlier": one_outlier,
    "sparse_outliers": sparse_outliers,
    "outlier_columns": outlier_columns,
    "student_t4": student_t4,
}


def robust_sigma(weight: Tensor) -> float:
    """Standard deviation of the bulk: median |w| over that of N(0, 1), which outliers do not move."""
    return float(weight.abs().flatten().float().median()) / NORMAL_MEDIAN

"""Synthetic weights and activations with and without outliers, and statistics of a weight's outliers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from loralab.numerics.defined import defined

SIGMA = 0.02  # a common standard deviation at initialization; relative errors do not depend on it
OUTLIER = 6.0  # in standard deviations
NORMAL_MEDIAN = 0.6744897501960817  # median |z| of N(0, 1)


def gauss(shape: tuple[int, int], random: Generator) -> Tensor:
    """Normal weights N(0, SIGMA^2), of ``shape`` (out, in) as all synthetic weights."""
    return SIGMA * torch.randn(shape, generator=random)


def student_t4(shape: tuple[int, int], random: Generator) -> Tensor:
    """Student's t with 4 degrees of freedom, z / sqrt(chi2_4 / 4), scaled to variance SIGMA^2: heavy tails."""
    chi2 = torch.stack([torch.randn(shape, generator=random).square() for _ in range(4)]).sum(dim=0)
    return gauss(shape, random) / (chi2 / 4).sqrt() / 2**0.5


def one_outlier(shape: tuple[int, int], random: Generator) -> Tensor:
    """Normal, with a single weight of 200 SIGMA."""
    weight = gauss(shape, random)
    weight[shape[0] // 2, shape[1] // 2] = 200 * SIGMA
    return weight


def sparse_outliers(shape: tuple[int, int], random: Generator) -> Tensor:
    """Normal, with one weight in a thousand (at random) times 20."""
    weight = gauss(shape, random)
    return torch.where(torch.rand(shape, generator=random) < 0.001, 20 * weight, weight)


def outlier_columns(shape: tuple[int, int], random: Generator) -> Tensor:
    """Normal, with 8 input features times 20, as the outlier features of activations are (LLM.int8(), section 4)."""
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


def activations(rows: int, width: int, random: Generator) -> Tensor:
    """(rows, width) N(0, 1) with outlier features as LLM.int8() (arXiv 2208.07339), section 4, finds them from 6.7B
    parameters on: 6 of 4096 features (at least one), each of one sign, at 75% of the tokens between 6 and 60."""
    x = torch.randn(rows, width, generator=random)
    features = torch.randperm(width, generator=random)[: max(1, round(width * 6 / 4096))]
    size = (rows, len(features))
    magnitudes = 6.0 + 54.0 * torch.rand(size, generator=random)
    signs = 1.0 - 2.0 * torch.randint(0, 2, size[1:], generator=random)
    x[:, features] = torch.where(torch.rand(size, generator=random) < 0.75, signs * magnitudes, x[:, features])
    return x


def normal(rows: int, width: int, random: Generator) -> Tensor:
    """(rows, width) N(0, 1), without outlier features: values of 6 and more are as good as impossible."""
    return torch.randn(rows, width, generator=random)


ACTIVATIONS: dict[str, Callable[[int, int, Generator], Tensor]] = {"outlier_features": activations, "normal": normal}


def median(values: Tensor) -> float:
    """The median, the mean of the two middle values where their number is even; nan of no values."""
    if not values.numel():
        return float("nan")
    return (float(values.median()) - float((-values).median())) / 2


def robust_sigma(weight: Tensor) -> float | None:
    """The standard deviation of a normal distribution with the same median |w|, on which outliers have no effect.

    Taken over the weights other than 0, for pruned layers; None where every weight is 0."""
    nonzero = weight[weight != 0].abs().double()
    return median(nonzero) / NORMAL_MEDIAN if nonzero.numel() else None


def census(weight: Tensor) -> dict[str, Any]:
    """weight (out, in) -> statistics of its outliers, in units of ``robust_sigma``; None where ``undefined`` has the
    reason."""
    shape = {"shape": list(weight.shape)}
    keys = ("sigma", "zero_share", "max_over_sigma", "share_over_6_sigma", "kurtosis", "loudest_column")
    sigma, values = robust_sigma(weight), weight.abs().double()
    if sigma is None:
        zeros = dict.fromkeys(keys, "every weight is 0")
        return defined({**shape, **dict.fromkeys(keys), "zero_share": 1.0}, zeros)
    scaled = values / sigma
    columns = scaled.square().mean(dim=0).sqrt()
    middle = median(columns)
    statistics = {
        "sigma": sigma,
        "zero_share": float((values == 0).double().mean()),
        "max_over_sigma": float(scaled.max()),
        "share_over_6_sigma": float((scaled > OUTLIER).double().mean()),
        "kurtosis": float(scaled.pow(4).mean()) / float(scaled.square().mean()) ** 2,  # 3 for a normal distribution
        "loudest_column": float(columns.max()) / middle if middle else None,  # RMS of a column, over the median
    }
    return defined({**shape, **statistics}, {"loudest_column": "half of the columns are 0"})

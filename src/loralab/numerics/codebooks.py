"""The values in [-1, 1] that 4-bit and 8-bit codes stand for: a code is an index into one of these tables."""

from statistics import NormalDist

import torch
from torch import Tensor

# ((1 - 1/30) + (1 - 1/32)) / 2 as rounded in bitsandbytes: keeps the outermost quantiles finite.
NF4_OFFSET = 0.9677083


def nf4_values() -> tuple[float, ...]:
    """NormalFloat4 (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, appendix E): 16 ascending values.

    Quantiles of N(0, 1) on an even grid of probabilities, 8 positive, 7 negative and an exact zero, divided
    by the largest. The grid is float32, as in the code that made the published table: with float64 the last
    digits differ. (Equation 4 of the paper as printed gives infinite ends and another, symmetric table.)
    """
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in torch.linspace(NF4_OFFSET, 0.5, 9)[:-1].tolist()]
    negative = [-quantile(p) for p in torch.linspace(NF4_OFFSET, 0.5, 8)[:-1].tolist()]
    values = torch.tensor(sorted([*positive, 0.0, *negative]), dtype=torch.float32)
    return tuple((values / values.max()).tolist())


def fp4_values() -> tuple[float, ...]:
    """bitsandbytes' FP4 in code order: sign, 2 exponent bits, 1 mantissa bit, divided by 12.

    Not the E2M1 of the QLoRA paper: the smallest step is 0.0625 / 12 where E2M1 has 0.5 / 6.
    """
    magnitudes = torch.tensor([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0])
    return tuple((torch.cat([magnitudes, -magnitudes]) / 12.0).tolist())


def e2m1_values() -> tuple[float, ...]:
    """FP4 with 2 exponent bits and 1 mantissa bit, the E2M1 of QLoRA table 2, in code order, divided by 6."""
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    return tuple((torch.cat([magnitudes, -magnitudes]) / 6.0).tolist())


def e3m0_values() -> tuple[float, ...]:
    """FP4 with 3 exponent bits and no mantissa, the E3M0 of QLoRA table 2, in code order, divided by 16."""
    magnitudes = torch.tensor([0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0])
    return tuple((torch.cat([magnitudes, -magnitudes]) / 16.0).tolist())


def int4_values() -> tuple[float, ...]:
    """Int4 absmax: -7/7 to 7/7, evenly spaced; the sixteenth code is not used."""
    return tuple((torch.arange(-7, 8) / 7.0).tolist())


def dynamic_values() -> tuple[float, ...]:
    """Signed dynamic 8-bit map (Dettmers 2016, arXiv 1511.04561): 256 ascending values.

    Seven decades from 10^-6 to 1: decade i has the midpoints of 2^i equal parts of [0.1, 1], times 10^(i - 6), in
    both signs; besides 0 and 1. Precise near 1 and wide in range, as the absmax values of double quantization need.
    """
    data = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2**i + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2.0
        data += (10.0 ** (i - 6) * means).tolist()
        data += (-(10.0 ** (i - 6)) * means).tolist()
    return tuple(torch.tensor(sorted(data), dtype=torch.float32).tolist())


FOUR_BIT = ("nf4", "fp4", "e2m1", "e3m0", "int4")
_VALUES = {
    "nf4": nf4_values(),
    "fp4": fp4_values(),
    "e2m1": e2m1_values(),
    "e3m0": e3m0_values(),
    "int4": int4_values(),
    "dynamic": dynamic_values(),
}
_tables: dict[tuple[str, torch.device], Tensor] = {}


def table(name: str, device: torch.device | str = "cpu") -> Tensor:
    """Code book ``name`` on ``device``, float32: (16,), int4 (15,), dynamic (256,). One tensor for the process."""
    key = (name, torch.device(device))
    if type(torch.empty(0)) is not Tensor:  # in a FakeTensorMode it would be fake, and must not be cached
        return torch.tensor(_VALUES[name], dtype=torch.float32, device=device)
    if key not in _tables:
        with torch.inference_mode(False):
            _tables[key] = torch.tensor(_VALUES[name], dtype=torch.float32, device=device)
    return _tables[key]


def nf4(device: torch.device | str = "cpu") -> Tensor:
    """The NF4 code book (16,) float32, ascending."""
    return table("nf4", device)


def fp4(device: torch.device | str = "cpu") -> Tensor:
    """bitsandbytes' FP4 code book (16,) float32, in code order (not ascending)."""
    return table("fp4", device)


def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """The signed dynamic 8-bit code book (256,) float32, ascending."""
    return table("dynamic", device)

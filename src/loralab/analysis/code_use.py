"""What a scheme makes of the codes it has: how many are used and how evenly, which weights it can no longer tell apart,
and what the largest weight costs those that share its scale."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from loralab.quantization.base import Quantizer, dense_weight
from loralab.quantization.linear import FrozenLinear

COMPARED = 2**20  # weights of each layer, from its first, that are looked through for distinct values


class CodeUse:
    """Counts over all layers of one scheme."""

    def __init__(self) -> None:
        self.histogram: list[int] = []  # weights on each code, from the lowest value to the highest
        self.distinct = self.distinct_after = 0

    def add(self, weight: Tensor, frozen: nn.Module) -> None:
        """Counts one layer: weight (out, in) float32, and what it was converted to."""
        levels = frozen.levels() if isinstance(frozen, FrozenLinear) else None
        if levels is None:
            return
        places, count = levels
        counts = torch.bincount(places, minlength=count).tolist()
        self.histogram = [a + b for a, b in zip(self.histogram or [0] * count, counts, strict=True)]
        before, after = (_bits(values) for values in (weight, frozen.dense(torch.float32)))  # type: ignore[operator]
        self.distinct += int(torch.unique(before * 2**32 + after).numel())
        self.distinct_after += int(torch.unique(after).numel())

    def summary(self) -> dict[str, Any]:
        """``codes``, ``codes_used``, ``code_entropy_bits`` (Shannon's, of the codes of all weights), ``merged_share``
        and ``code_histogram``; nothing for a scheme without codes.

        ``merged_share``: of the distinct pairs (weight, value after quantization) of a layer, how many fewer distinct
        values there are than pairs: of weights that share a scale, those that fall on a code with another one.
        """
        if not self.histogram:
            return {}
        share = torch.tensor(self.histogram, dtype=torch.float64) / sum(self.histogram)
        return {
            "codes": len(self.histogram),
            "codes_used": sum(count > 0 for count in self.histogram),
            "code_entropy_bits": float(torch.special.entr(share).sum() / torch.log(torch.tensor(2.0).double())),
            "merged_share": 1 - self.distinct_after / self.distinct,
            "code_histogram": self.histogram,
        }


def outlier_damage(quantizer: Quantizer, name: str, layer: nn.Module) -> dict[str, Any] | None:
    """What the largest weight of ``layer`` does to the others in its block, row or tensor.

    The layer is quantized as it is and with that weight set to 0; the weights whose value then differs are those that
    share its scale. Returns ``layer``, ``value``, ``weights`` (how many they are), and their ``relative_rmse`` and
    ``relative_rmse_without`` it; None where no other weight depends on it, all that do are 0, or an error overflows.
    """
    weight = dense_weight(layer).detach().float().contiguous()
    largest = int(weight.abs().argmax())
    without = weight.clone()
    without.view(-1)[largest] = 0.0
    before, after = (_requantized(quantizer, name, values).reshape(-1) for values in (weight, without))
    affected = before != after
    affected[largest] = False
    exact = weight.view(-1)[affected].double()
    if not exact.any():
        return None
    errors = [float((dense[affected].double() - exact).norm() / exact.norm()) for dense in (before, after)]
    if not all(map(math.isfinite, errors)):
        return None
    return {
        "layer": name,
        "value": float(weight.view(-1)[largest]),
        "weights": int(affected.sum()),
        "relative_rmse": errors[0],
        "relative_rmse_without": errors[1],
    }


def _requantized(quantizer: Quantizer, name: str, weight: Tensor) -> Tensor:
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    return dense_weight(quantizer.convert(dense, name)).detach().float()


def _bits(values: Tensor) -> Tensor:
    """The first ``COMPARED`` float32 values as whole numbers, equal where these are."""
    return (values.detach().reshape(-1)[:COMPARED].contiguous() + 0.0).view(torch.int32).long()

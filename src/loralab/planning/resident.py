"""Whether a quantized base keeps its dense weights: what ``quantization.dequantize=auto`` comes to in this process."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from loralab.memory.ledgers import GIB
from loralab.planning.sizes import quantized_weights
from loralab.quantization.linear import COMPUTE_DTYPES
from loralab.training.specs import TrialSpec

SHARE = 0.25  # of the free memory, that dense weights may take
AUTOCAST = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16, "16-mixed": torch.float16}


def computed_in(spec: TrialSpec, device: str) -> torch.dtype:
    """The dtype that the base computes in while it is trained on ``device``, cpu or cuda."""
    precision = spec.trainer.precision_on(device)
    if precision in AUTOCAST:
        return AUTOCAST[precision]
    given = spec.model.dtype
    found = getattr(torch, given) if given != "auto" else getattr(spec.model.architecture(), "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.float32


def dense_dtype(spec: TrialSpec, device: str) -> torch.dtype:
    """The dtype that quantized weights are dequantized to in training on ``device``."""
    return COMPUTE_DTYPES.get(spec.quantization.compute_dtype) or computed_in(spec, device)


def dense_bytes(spec: TrialSpec, device: str) -> int:
    """Bytes of all quantized weights dequantized on ``device``; 0 where none is quantized."""
    return quantized_weights(spec) * dense_dtype(spec, device).itemsize


def easily_fits(spec: TrialSpec, device: str, free: float) -> bool:
    """Whether the dense weights take at most SHARE of ``free`` bytes of ``device``, and of ``plan.budget_gib`` and
    ``memory.cap``. False where none of these is known, for a base that is spread over devices, and for runs with a
    ballast or lengthened batches, which cannot go on without the weights when the memory is full.

    ``free``: without the base; inf where it is unknown. Processes that train a trial together share that of a host.
    """
    if spec.quantization.name == "none" or spec.trainer.strategy == "fsdp" or not spec.memory.continues:
        return False
    size = spec.trainer.processes
    each = free / size if size > 1 and device == "cpu" else free
    limits = [limit * GIB for limit in (spec.plan.budget_gib, spec.memory.cap) if limit is not None]
    room = min([each, *limits])
    return math.isfinite(room) and dense_bytes(spec, device) <= SHARE * room


def settled(specs: Sequence[TrialSpec], dequantize: str) -> list[TrialSpec]:
    """``specs`` with ``dequantize``, per_use or resident, in place of auto."""
    return [_settled(spec, dequantize) for spec in specs]


def _settled(spec: TrialSpec, dequantize: str) -> TrialSpec:
    if spec.quantization.dequantize != "auto":
        return spec
    changes: dict[str, Any] = {"dequantize": dequantize}
    return replace(spec, quantization=replace(spec.quantization, **changes))

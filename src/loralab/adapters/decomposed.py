"""Starts of A and B that a singular value decomposition gives.

PiSSA: of the weight (Meng et al. 2024, arXiv:2404.02948, equations 2 and 3). LoftQ: of what quantization lost of it (Li
et al. 2023, arXiv:2310.08659, algorithm 1 with one step, so that all trials share one quantized weight).
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from loralab.adapters import eva
from loralab.adapters.hooks import AdapterHooks
from loralab.adapters.low_rank import LoRADelta, PiSSADelta
from loralab.errors import ConfigError
from loralab.quantization.base import dense_weight, is_frozen, linear_shape
from loralab.quantization.linear import without_autocast

log = logging.getLogger(__name__)

NO_ERROR = (
    "adapter.init_lora_weights=loftq starts B A at what quantization lost of each weight, and no adapted layer is "
    "quantized; valid: quantization=nf4 or another scheme, or adapter.init_lora_weights=pissa, which needs none"
)
NOT_QPISSA = (
    "PiSSA over a quantized base: B A starts at the principal part of each original weight, and the base stays the "
    "whole weight, quantized, which trials share; this is not QPiSSA, which quantizes the residual"
)


@dataclass(frozen=True)
class Decomposition:
    """The first singular values of a matrix (out, in), largest first, with their vectors; squared Frobenius norms."""

    u: Tensor  # (out, r)
    s: Tensor  # (r,)
    vh: Tensor  # (r, in)
    matrix_square: float
    weight_square: float  # of the layer's original weight

    def factors(self, r: int, scaling: float) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r), whose scaling B A is nearest to the matrix; each takes the root of a value."""
        roots = (self.s[:r] / scaling).sqrt()
        return roots[:, None] * self.vh[:r], self.u[:, :r] * roots


@torch.no_grad()
def begin(init: str, model: nn.Module, deltas: Mapping[str, Any]) -> str:
    """Starts ``deltas`` {layer: its LoRADelta} by ``init``, pissa, loftq or eva; by loftq those of quantized layers.

    Returns what a record should say of it; empty: nothing, as of a model without values (a count, a plan), whose deltas
    stay as they are. Raises ConfigError.
    """
    _check(init, model, deltas)
    no_values = any(parameter.is_meta or isinstance(parameter, FakeTensor) for parameter in model.parameters())
    if no_values or AdapterHooks.of(model).restoring:
        return ""
    return eva.begin(model, deltas) if init == "eva" else _begin(init, model, deltas)


def _begin(init: str, model: nn.Module, deltas: Mapping[str, Any]) -> str:
    quantized = {name: delta for name, delta in deltas.items() if is_frozen(model.get_submodule(name))}
    if init == "loftq" and not quantized:
        raise ConfigError(NO_ERROR)
    before = after = whole = 0.0
    for delta, decomposition in _decompositions(init, model, deltas if init == "pissa" else quantized):
        r = delta.lora_A.shape[0]
        delta.begin(*decomposition.factors(r, delta.scaling))
        before, whole = before + decomposition.matrix_square, whole + decomposition.weight_square
        after += decomposition.matrix_square - float(decomposition.s[:r].square().sum())
    note = NOT_QPISSA if quantized else ""
    if init == "loftq":
        after_share, share = (max(0.0, square / whole) ** 0.5 if whole else 0.0 for square in (after, before))
        note = f"LoftQ: of the quantized weights' norm {share:.2%} is lost, {after_share:.2%} with B A at its start"
    if note:
        log.info("%s", note)
    return note


def _check(init: str, model: nn.Module, deltas: Mapping[str, Any]) -> None:
    kind = PiSSADelta if init == "pissa" else LoRADelta
    for name, delta in deltas.items():
        if not isinstance(delta, kind):
            raise ConfigError(
                f"adapter.init_lora_weights={init} does not know how {type(delta).__name__} of {name} begins; valid: a "
                f"delta derived from {kind.__name__}, or init_lora_weights=kaiming"
            )
        r, shape = delta.lora_A.shape[0], linear_shape(model.get_submodule(name))
        most = shape[1] if init == "eva" else min(shape)
        if r > most:
            raise ConfigError(
                f"adapter.r={r}: {name} is {shape[0]} x {shape[1]}, which has {most} principal directions for "
                f"adapter.init_lora_weights={init}; valid: at most {most}, for all layers or by adapter.rank_pattern"
            )


def _decompositions(init: str, model: nn.Module, deltas: Mapping[str, Any]) -> Iterator[tuple[Any, Decomposition]]:
    """(delta, decomposition) of each of ``deltas``. What one trial computes is kept for the next of its pack, unless
    that needs a higher rank; to cut it shorter changes no bit."""
    kept: dict[tuple[str, str], Decomposition] = AdapterHooks.of(model).decomposed
    ranks = {name: delta.lora_A.shape[0] for name, delta in deltas.items()}
    lacking = [name for name, r in ranks.items() if (init, name) not in kept or kept[init, name].s.numel() < r]
    weights = _original_weights(model, lacking, init)
    for name, delta in deltas.items():
        if name in lacking:
            kept[init, name] = _decomposed(next(weights), model.get_submodule(name), init, ranks[name])
        yield delta, kept[init, name]


def _original_weights(model: nn.Module, names: list[str], init: str) -> Iterator[Tensor]:
    """The weight (out, in) of each layer before quantization, one at a time."""
    quantized = [name for name in names if is_frozen(model.get_submodule(name))]
    read = AdapterHooks.of(model).originals
    if quantized and read is None:
        raise ConfigError(
            f"adapter.init_lora_weights={init} needs the weight of {quantized[0]} as it was before quantization, and "
            "nothing says where this base came from; valid: a base that loralab.models.loading has loaded"
        )
    stored = iter(read(model, quantized)) if quantized and read is not None else iter(())
    for name in names:
        layer = model.get_submodule(name)
        yield next(stored) if is_frozen(layer) else dense_weight(layer)


def _decomposed(weight: Tensor, layer: nn.Module, init: str, r: int) -> Decomposition:
    """Of the layer's original ``weight``, or with loftq of what its quantization lost. The whole decomposition is
    computed, in float32 on the layer's device, and the first ``r`` values kept."""
    quantized = dense_weight(layer).detach()
    original = weight.detach().to(quantized.device).float()
    matrix = original - quantized.float() if init == "loftq" else original
    with without_autocast(matrix.device.type):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    squares = (float(value.square().sum(dtype=torch.float64)) for value in (matrix, original))
    return Decomposition(u[:, :r].clone(), s[:r].clone(), vh[:r].clone(), *squares)

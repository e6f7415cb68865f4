"""Training in a random subspace: W = W0 + P theta with few numbers theta (Aghajanyan, Zettlemoyer and Gupta 2020,
"Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning", arXiv 2012.13255, section 3.1).

P is the Fastfood transform H G Pi H B (Le, Sarlos and Smola 2013), which is never written out: B are random signs, Pi a
permutation, G normal numbers, H a Walsh-Hadamard matrix. Its columns have length one on average.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, pad

from loralab.adapters.base import (
    Adapter,
    AdapterSpec,
    Saved,
    freeze,
    generator_for,
    match_targets,
    modules_to_save,
    outside,
    save_modules,
)
from loralab.adapters.seeded import SeededAdapter
from loralab.adapters.targets import Targets
from loralab.errors import ConfigError
from loralab.quantization.base import linear_shape
from loralab.spec import Count, spec


@spec("adapter")
class Intrinsic(AdapterSpec):
    """``dimension`` numbers move the weights of all targeted layers.

    did: W_l = W0_l + P_l theta. said, the structure-aware form: W_l = W0_l + lambda_l P_l theta with one trained
    lambda a layer, which are counted in ``dimension``: theta has ``dimension`` minus the number of layers. The paper
    projects every parameter of the model; here those are the weight matrices that ``target_modules`` names.
    """

    packable: ClassVar[bool] = True
    tokenwise: ClassVar[bool] = True
    layerwise: ClassVar[bool] = True
    size_field: ClassVar[str] = "dimension"

    dimension: Count = 1000
    variant: Literal["did", "said"] = "did"
    target_modules: Targets = "all-linear"
    modules_to_save: Saved = None  # null: a new classification head

    def attach(self, model: nn.Module, seed: int = 0) -> Adapter:
        freeze(model)
        names = outside(match_targets(model, self.target_modules), modules_to_save(model, self.modules_to_save))
        adapter = IntrinsicAdapter(model, self, self._coordinates(len(names)), seed)
        for name in names:
            adapter.add(name, ProjectedDelta(adapter, linear_shape(model.get_submodule(name)), self.variant == "said"))
        adapter.draw()
        save_modules(adapter, model, self.modules_to_save, seed)
        return adapter.to(next(model.parameters()).device)

    def _coordinates(self, layers: int) -> int:
        """Length of theta over ``layers`` layers. Raises ConfigError where nothing is left of it."""
        scales = layers if self.variant == "said" else 0
        if self.dimension <= scales:
            raise ConfigError(
                f"adapter.dimension={self.dimension}: variant=said counts one scale for each of the {layers} adapted "
                f"layers in it; valid: more than {layers}, fewer target_modules, or variant=did"
            )
        return self.dimension - scales


class IntrinsicAdapter(SeededAdapter):
    """Owns ``theta`` (coordinates,), which the deltas of all layers project; draws P from its seed."""

    def __init__(self, model: nn.Module, spec: AdapterSpec, coordinates: int, seed: int) -> None:
        super().__init__(model, spec, seed)
        self.theta = nn.Parameter(torch.zeros(coordinates, device=next(model.parameters()).device))

    def draw(self) -> None:
        """Draws P of every layer from ``seed``."""
        for name, delta in self.adapted():
            if isinstance(delta, ProjectedDelta):
                delta.draw(generator_for(int(self.seed), name))


class ProjectedDelta(nn.Module):
    """y + x (lambda P theta)^T with P theta reshaped to (out, in); lambda is 1 and fixed without ``scaled``.

    What P is drawn from is held in ``signs`` (n,) int8, ``permutation`` (n,) int32 and ``gauss`` (n,) float32, n the
    least power of two that is at least in_features * out_features and the length of theta.
    """

    signs: Tensor
    permutation: Tensor
    gauss: Tensor

    def __init__(self, adapter: IntrinsicAdapter, shape: tuple[int, int], scaled: bool) -> None:
        super().__init__()
        self._adapter = [adapter]  # in a list: theta belongs to the adapter alone
        self.shape, device = shape, adapter.theta.device
        size = 2 ** math.ceil(math.log2(max(shape[0] * shape[1], adapter.theta.numel(), 2)))
        for name, dtype in (("signs", torch.int8), ("permutation", torch.int32), ("gauss", torch.float32)):
            self.register_buffer(name, torch.empty(size, dtype=dtype, device=device), persistent=False)
        self.scale = nn.Parameter(torch.ones((), device=device)) if scaled else None

    def draw(self, generator: torch.Generator) -> None:
        """Draws P, the same again from the same ``generator``; on the meta device nothing."""
        if self.signs.is_meta:
            return
        size = self.signs.numel()
        self.signs.copy_(torch.randint(2, (size,), generator=generator) * 2 - 1)
        self.permutation.copy_(torch.randperm(size, generator=generator))
        self.gauss.copy_(torch.randn(size, generator=generator))

    def delta_weight(self) -> Tensor:
        """(out, in) float32: what is added to the layer's weight."""
        weight: Tensor = _Fastfood.apply(self._adapter[0].theta, self)  # type: ignore[no-untyped-call]
        return weight if self.scale is None else self.scale * weight

    def merged(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weight with the update added."""
        return {"weight": own["weight"] + self.delta_weight()}

    def forward(self, x: Tensor, y: Tensor, key: int | None) -> Tensor:  # (..., in), (..., out) -> (..., out)
        return y + linear(x, self.delta_weight().to(x.dtype)).to(y.dtype)

    def project(self, theta: Tensor) -> Tensor:
        """P theta, shape (out, in)."""
        size, count = self.signs.numel(), self.shape[0] * self.shape[1]
        mixed = hadamard(pad(theta, (0, size - theta.numel())) * self.signs)
        spread = hadamard(mixed[self.permutation] * self.gauss)
        return (spread[:count] * self._unit()).view(*self.shape)

    def project_back(self, gradient: Tensor, coordinates: int) -> Tensor:
        """P^T of a gradient (out, in): shape (coordinates,)."""
        size = self.signs.numel()
        flat = gradient.float().reshape(-1) * self._unit()
        spread = hadamard(pad(flat, (0, size - flat.numel()))) * self.gauss
        mixed = torch.empty_like(spread)
        mixed[self.permutation.long()] = spread
        return (hadamard(mixed) * self.signs)[:coordinates]

    def _unit(self) -> Tensor:
        """What makes the columns of P of length one on average: 1 / (|G| sqrt(out in)).

        A column of H G Pi H B holds n numbers of variance |G|^2, of which out * in are kept.
        """
        lengths: Tensor = self.gauss.norm() * math.sqrt(self.shape[0] * self.shape[1])
        return lengths.reciprocal()


class _Fastfood(torch.autograd.Function):
    """P is linear: nothing is kept for backward."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, delta: ProjectedDelta) -> Tensor:
        ctx.delta, ctx.coordinates = delta, theta.numel()
        return delta.project(theta)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        coordinates: Tensor = ctx.delta.project_back(gradient, ctx.coordinates)
        return coordinates, None


def hadamard(x: Tensor) -> Tensor:
    """x (n,), n a power of two -> the product with the Walsh-Hadamard matrix of +1 and -1, in about n log2 n additions.

    That matrix is the Kronecker product of small ones. Each product moves the axis it has done to the front, so that
    the next one meets the axis beside it, and the last leaves all in order: eight times as fast as sums of halves.
    """
    remaining = x.numel()
    while remaining > 1:
        width = min(remaining, 16)
        x = (_hadamard_matrix(width, x) @ x.view(-1, width).t()).reshape(-1)
        remaining //= width
    return x


def _hadamard_matrix(width: int, like: Tensor) -> Tensor:
    """(width, width), in the dtype and on the device of ``like``."""
    matrix = like.new_ones(1, 1)
    while matrix.shape[0] < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix

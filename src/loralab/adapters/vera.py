"""VeRA: y = W x + Lambda_b B Lambda_d A x with A and B random (Kopiczko et al. 2024, arXiv 2310.11454, eq. 2)."""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

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
from loralab.quantization.base import linear_shape
from loralab.spec import Count, Positive, spec


@spec("adapter")
class VeRA(AdapterSpec):
    """Two trained vectors a layer, around random matrices that all layers of one shape share.

    The files are loralab's own: PEFT cuts the matrices of every shape out of one pair.
    """

    packable: ClassVar[bool] = True
    tokenwise: ClassVar[bool] = True
    layerwise: ClassVar[bool] = True
    size_field: ClassVar[str] = "r"

    r: Count = 256
    d_initial: Positive = 0.1  # d at the start; b starts at 0
    target_modules: Targets = "all-linear"
    modules_to_save: Saved = None  # null: a new classification head

    def attach(self, model: nn.Module, seed: int = 0) -> Adapter:
        freeze(model)
        device = next(model.parameters()).device
        adapter = VeRAAdapter(model, self, seed)
        names = outside(match_targets(model, self.target_modules), modules_to_save(model, self.modules_to_save))
        shapes = {name: linear_shape(model.get_submodule(name)) for name in names}
        shared = {shape: SharedMatrices(shape, self.r, device) for shape in dict.fromkeys(shapes.values())}
        for name in names:
            adapter.add(name, VeRADelta(shared[shapes[name]], self.d_initial))
        adapter.draw()
        save_modules(adapter, model, self.modules_to_save, seed)
        return adapter


class VeRAAdapter(SeededAdapter):
    """Draws A and B from its seed."""

    def draw(self) -> None:
        """Draws A and B of every shape from ``seed``."""
        for shared in {delta.shared: None for _, delta in self.adapted() if isinstance(delta, VeRADelta)}:
            shared.draw(int(self.seed))


class SharedMatrices(nn.Module):
    """A (r, in) and B (out, r) of all layers of one shape, frozen, and in no file."""

    vera_A: Tensor  # noqa: N815 - PEFT's name
    vera_B: Tensor  # noqa: N815

    def __init__(self, shape: tuple[int, int], r: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        out_features, in_features = shape
        self.register_buffer("vera_A", torch.empty(r, in_features, device=device), persistent=False)
        self.register_buffer("vera_B", torch.empty(out_features, r, device=device), persistent=False)

    def draw(self, seed: int) -> None:
        """Kaiming's uniform draw, +-sqrt(6 / columns), from (seed, shape); on the meta device nothing."""
        for name, matrix in self.named_buffers():
            if not matrix.is_meta:
                shape = f"{name} {self.vera_B.shape[0]} x {self.vera_A.shape[1]}"
                drawn = torch.rand(matrix.shape, generator=generator_for(seed, shape))
                matrix.copy_((drawn * 2 - 1) * math.sqrt(6 / matrix.shape[1]))


class VeRADelta(nn.Module):
    """The update of one layer: d (r,) and b (out,) train; b is 0, so that training starts at the base model."""

    def __init__(self, shared: SharedMatrices, d_initial: float = 0.1) -> None:
        super().__init__()
        self.shared = shared  # a submodule of all deltas of the shape; its buffers are in no state
        r, device = shared.vera_A.shape[0], shared.vera_A.device
        self.vera_lambda_d = nn.Parameter(torch.full((r,), d_initial, device=device))
        self.vera_lambda_b = nn.Parameter(torch.zeros(shared.vera_B.shape[0], device=device))

    def forward(self, x: Tensor, y: Tensor, key: int | None) -> Tensor:  # (..., in), (..., out) -> (..., out)
        inner = linear(x, self.shared.vera_A.to(x.dtype)) * self.vera_lambda_d.to(x.dtype)
        outer = linear(inner, self.shared.vera_B.to(x.dtype)) * self.vera_lambda_b.to(x.dtype)
        return y + outer.to(y.dtype)

    def delta_weight(self) -> Tensor:
        """Lambda_b B Lambda_d A, shape (out, in): what merging adds to W."""
        return (self.vera_lambda_b[:, None] * self.shared.vera_B * self.vera_lambda_d) @ self.shared.vera_A

    def merged(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weight with the update added."""
        return {"weight": own["weight"] + self.delta_weight()}

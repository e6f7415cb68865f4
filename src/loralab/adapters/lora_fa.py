"""LoRA-FA: LoRA whose A stays as it was drawn; B alone trains (Zhang et al. 2023, arXiv:2308.03303).

A takes no gradient, so a layer keeps A x, r numbers a position, for the backward pass in place of x.
"""

from pathlib import Path
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
from loralab.adapters.lora import LoRA, LoRAAdapter, Rank
from loralab.adapters.low_rank import LoRADelta
from loralab.adapters.targets import Targets
from loralab.quantization.base import linear_shape
from loralab.spec import Positive, spec


@spec("adapter")
class LoRAFA(AdapterSpec):
    """y = W x + (lora_alpha / r) B A x with W and A frozen; A is drawn as LoRA draws it."""

    packable: ClassVar[bool] = True
    tokenwise: ClassVar[bool] = True
    layerwise: ClassVar[bool] = True
    size_field: ClassVar[str] = "r"

    r: Rank = 8
    lora_alpha: Positive = 16.0
    target_modules: Targets = "all-linear"
    modules_to_save: Saved = None  # null: a new classification head

    @property
    def method(self) -> str:
        return "lora_fa"

    def attach(self, model: nn.Module, seed: int = 0) -> Adapter:
        freeze(model)
        device = next(model.parameters()).device
        adapter = self.makes(model, self)
        for name in outside(match_targets(model, self.target_modules), modules_to_save(model, self.modules_to_save)):
            out_features, in_features = linear_shape(model.get_submodule(name))
            delta = LoRAFADelta(in_features, out_features, self.r, self.lora_alpha / self.r, device=device)
            delta.draw("kaiming", generator_for(seed, name))
            adapter.add(name, delta)
        save_modules(adapter, model, self.modules_to_save, seed)
        return adapter


class LoRAFADelta(LoRADelta):
    """The update of one layer: A (r, in) drawn and fixed, B (out, r) zero."""

    def __init__(
        self, in_features: int, out_features: int, r: int, scaling: float, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(in_features, out_features, r, scaling, device=device)
        fixed = self.lora_A.detach()
        del self.lora_A
        self.register_buffer("lora_A", fixed)

    def forward(self, x: Tensor, y: Tensor, key: int | None) -> Tensor:  # (..., in), (..., out) -> (..., out)
        inner = linear(x.to(self.lora_A.dtype), self.lora_A)  # autograd keeps no x for an A without a gradient
        return y + linear(self.scaling * inner, self.lora_B).to(y.dtype)

    merged = LoRADelta.merged


class LoRAFAAdapter(LoRAAdapter):
    """On disk it is PEFT's LoRA, which computes the same logits from A and B."""

    def __init__(self, model: nn.Module, spec: LoRAFA) -> None:
        super().__init__(
            model,
            LoRA(spec.r, spec.lora_alpha, target_modules=spec.target_modules, modules_to_save=spec.modules_to_save),
        )
        self.spec = spec

    def export(self, folder: Path) -> None:  # of this very class: ``lost`` below is then asked, and not LoRA's
        super().export(folder)

    def lost(self) -> str:
        strange = (f"{type(own).__name__} of {name}" for name, own in self.adapted() if type(own) is not LoRAFADelta)
        return next(strange, "")


LoRAFA.makes = LoRAFAAdapter

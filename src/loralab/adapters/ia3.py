"""(IA)3: keys, values and what enters an MLP's last projection, each times a trained vector (Liu et al. 2022,
arXiv:2205.05638, section 3.3)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Strict
from torch import Tensor, nn

from loralab.adapters import peft
from loralab.adapters.base import (
    Adapter,
    AdapterSpec,
    Saved,
    freeze,
    match_targets,
    modules_to_save,
    outside,
    save_modules,
)
from loralab.adapters.files import WEIGHTS, read_state
from loralab.adapters.grouped import Given, by_part
from loralab.adapters.projections import projections
from loralab.errors import ArtifactError, ConfigError
from loralab.quantization.base import linear_shape
from loralab.spec import spec

Layers = Annotated[
    list[str] | Annotated[str, Strict()] | None, "null, all-linear, a list of names or a regular expression"
]


@spec("adapter")
class IA3(AdapterSpec):
    """``feedforward_modules``, of the ``target_modules``, are scaled where they are entered, all others where they end.

    null, both: keys, values and the MLP's last projection by the architecture's own names. Where a layer computes the
    query with them (GPT-2's ``c_attn``), all it gives is scaled, as PEFT has it.
    """

    packable: ClassVar[bool] = True
    tokenwise: ClassVar[bool] = True
    layerwise: ClassVar[bool] = True

    target_modules: Layers = None
    feedforward_modules: Layers = None
    modules_to_save: Saved = None

    def __post_init__(self) -> None:
        if self.target_modules is None and self.feedforward_modules is not None:
            raise ConfigError(
                f"adapter.feedforward_modules={self.feedforward_modules} without adapter.target_modules, which it is a "
                "part of; valid: both, or neither for the architecture's own"
            )

    def attach(self, model: nn.Module, seed: int = 0) -> Adapter:
        freeze(model)
        adapter = self.makes(model, self)
        targets, entered = self._layers(model)
        device = next(model.parameters()).device
        for name in outside(targets, modules_to_save(model, self.modules_to_save)):
            out_features, in_features = linear_shape(model.get_submodule(name))
            inside = name in entered
            adapter.add(name, IA3Delta(in_features if inside else out_features, inside, device), before=inside)
        save_modules(adapter, model, self.modules_to_save, seed)
        return adapter

    def _layers(self, model: nn.Module) -> tuple[list[str], list[str]]:
        """All layers, and those of them that are scaled where they are entered."""
        if self.target_modules is None:
            found = projections(model, self.method)
            return [*found.keys_values, *found.mlp_outputs], found.mlp_outputs
        targets = match_targets(model, self.target_modules)
        entered = match_targets(model, self.feedforward_modules) if self.feedforward_modules else []
        strange = [name for name in entered if name not in targets]
        if strange:
            raise ConfigError(
                f"adapter.feedforward_modules: {strange[0]} is none of adapter.target_modules; valid: a part of them"
            )
        return targets, entered


class IA3Delta(nn.Module):
    """y times a vector, of ones at first; ``entering``: y is what enters the layer."""

    def __init__(self, width: int, entering: bool, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.entering = entering
        self.ia3_l = nn.Parameter(torch.ones(width, device=device))

    def forward(self, x: Tensor, y: Tensor, key: int | None) -> Tensor:  # y (..., width) -> (..., width)
        return (y * self.ia3_l).to(y.dtype)

    def merged(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weight's columns scaled, or its rows and the bias."""
        if self.entering:
            return {"weight": own["weight"] * self.ia3_l}
        bias = {"bias": own["bias"] * self.ia3_l} if "bias" in own else {}
        return {"weight": own["weight"] * self.ia3_l[:, None], **bias}

    @staticmethod
    def forward_grouped(x: Tensor, y: Tensor, slices: Sequence[Given]) -> Tensor:
        """The scales of several trials, each (start, stop, delta, key) at its own positions."""
        return by_part(y, slices, lambda own, delta, key: delta(own, own, key))


class IA3Adapter(Adapter):
    """On disk it is PEFT's, which computes the same logits from it."""

    def export(self, folder: Path) -> None:
        peft.write(folder, self._config(), {**peft.frozen_heads(self), **self._state()})

    def restore(self, folder: Path) -> None:
        own, stored = self._state(), read_state(folder / WEIGHTS)
        wrong = [key for key in own if key not in stored or stored[key].shape != own[key].shape]
        wrong += sorted(set(stored) - set(own) - set(peft.frozen_heads(self)))
        if wrong:
            raise ArtifactError(f"{folder / WEIGHTS} and {type(self._model[0]).__name__} do not agree in {wrong[0]}")
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(stored[key])

    def lost(self) -> str:
        kinds = [f"{type(delta).__name__} of {name}" for name, delta in self.adapted() if type(delta) is not IA3Delta]
        return next(iter(kinds), "")

    def _scales(self) -> dict[str, IA3Delta]:
        return {name: delta for name, delta in self.adapted() if isinstance(delta, IA3Delta)}

    def _state(self) -> dict[str, Tensor]:
        """{PEFT's name: the trained tensor in PEFT's shape}, (1, in) or (out, 1)."""
        scales = {
            f"{peft.PREFIX}{name}.ia3_l": one.ia3_l.detach().view(*((1, -1) if one.entering else (-1, 1)))
            for name, one in self._scales().items()
        }
        for name, module in self.saved_modules():
            own = module.state_dict()
            scales.update({key: own[inside] for key, inside in peft.saved_keys(name, module).items()})
        return scales

    def _config(self) -> dict[str, Any]:
        model, scales = self._model[0], self._scales()
        return {
            "peft_type": "IA3",
            **peft.base_fields(model),
            "target_modules": list(scales),
            "feedforward_modules": [name for name, one in scales.items() if one.entering],
            "fan_in_fan_out": peft.transposed(model, list(scales)),
            "modules_to_save": [name for name, _ in self.saved_modules()] or None,
            "init_ia3_weights": True,
        }


IA3.makes = IA3Adapter

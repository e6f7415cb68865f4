"""Bottleneck adapters: y + W_up f(W_down y + b_down) + b_up after attention and MLP (Houlsby 2019, arXiv:1902.00751).

By the LoRA paper's names and counts (arXiv:2106.09685, section 5.1), d wide and r in the middle, a block has
AdapterH (``houlsby``): 2 (2 d r + r + d), after attention and after the MLP;
AdapterP (``pfeiffer``, Pfeiffer et al. 2021, arXiv:2005.00247): 2 d r + r + d, after the MLP;
AdapterL (``adapterl``, Lin et al. 2020, arXiv:2004.03829): the same and 2 d, of a LayerNorm before W_down.
The base's own norms stay frozen, as these counts say. An adapter acts on what the part's last projection gives, before
the base's dropout, its residual and its norm.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from loralab.adapters.dropout import dropout_of_each, keyed_dropout, length_of
from loralab.adapters.grouped import Given, by_part
from loralab.adapters.projections import projections
from loralab.adapters.targets import TargetsOrNull
from loralab.quantization.base import linear_shape
from loralab.spec import Count, Share, spec

NON_LINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@spec("adapter")
class Bottleneck(AdapterSpec):
    """``target_modules``: null, the architecture's own projections, or layers after which an adapter is put."""

    packable: ClassVar[bool] = True
    tokenwise: ClassVar[bool] = True
    layerwise: ClassVar[bool] = True
    size_field: ClassVar[str] = "bottleneck_size"
    unmergeable: ClassVar[str] = (
        "what follows a layer is a function with a non-linearity, which no weight of the layer computes"
    )

    variant: Literal["houlsby", "pfeiffer", "adapterl"] = "houlsby"
    bottleneck_size: Count = 64
    non_linearity: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    dropout: Share = 0.0
    target_modules: TargetsOrNull = None
    modules_to_save: Saved = None

    def attach(self, model: nn.Module, seed: int = 0) -> Adapter:
        freeze(model)
        adapter = self.makes(model, self)
        device = next(model.parameters()).device
        for name in outside(self._targets(model), modules_to_save(model, self.modules_to_save)):
            width = linear_shape(model.get_submodule(name))[0]
            delta = BottleneckDelta(width, self.bottleneck_size, self.non_linearity, self.dropout, device)
            if self.variant == "adapterl":
                delta.norm = nn.LayerNorm(width, device=device)
            delta.draw(generator_for(seed, name))
            adapter.add(name, delta)
        save_modules(adapter, model, self.modules_to_save, seed)
        return adapter

    def _targets(self, model: nn.Module) -> list[str]:
        if self.target_modules is not None:
            return match_targets(model, self.target_modules)
        found = projections(model, self.method)
        return [*(found.attention_outputs if self.variant == "houlsby" else []), *found.mlp_outputs]


class BottleneckDelta(nn.Module):
    """One adapter, ``width`` wide and ``size`` in the middle; ``up`` is zero at first: training starts at the base."""

    def __init__(
        self,
        width: int,
        size: int,
        non_linearity: str = "relu",
        dropout: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.norm: nn.Module | None = None
        self.down = nn.Linear(width, size, device=device)
        self.up = nn.Linear(size, width, device=device)
        self.non_linearity, self.dropout = non_linearity, dropout

    def draw(self, generator: torch.Generator) -> None:
        """``down`` uniform in +-1/sqrt(width), all else zero."""
        with torch.no_grad():
            for zero in (self.down.bias, self.up.weight, self.up.bias):
                zero.zero_()
            if not self.down.weight.is_meta:
                drawn = torch.rand(self.down.weight.shape, generator=generator) * 2 - 1
                self.down.weight.copy_(drawn / math.sqrt(self.down.in_features))

    def forward(self, x: Tensor, y: Tensor, key: int | None) -> Tensor:  # y (..., width) -> (..., width)
        return self.adapted(y, partial(keyed_dropout, p=self.dropout, key=key, length=length_of(y)))

    def adapted(self, y: Tensor, drop: Callable[[Tensor], Tensor]) -> Tensor:
        """y with what the adapter adds to it, of which ``drop`` drops elements."""
        autocast = torch.is_autocast_enabled(y.device.type)
        own = y if autocast else y.to(self.down.weight.dtype)
        inner = own if self.norm is None else self.norm(own)
        added = self.up(NON_LINEARITIES[self.non_linearity](self.down(inner)))
        return y + drop(added).to(y.dtype)

    @staticmethod
    def forward_grouped(x: Tensor, y: Tensor, slices: Sequence[Given]) -> Tensor:
        """The adapters of several trials, each (start, stop, delta, key) at its own positions."""
        parts = [(stop - start, delta.dropout, key) for start, stop, delta, key in slices]
        drops = iter(dropout_of_each(y, parts, length_of(y)))
        return by_part(y, slices, lambda own, delta, key: delta.adapted(own, next(drops)))

"""Last-layer tuning: the last blocks train whole, in float32 copies of their own; everything below stays the base's.

What trains is what the LoRA paper's FT-top2 counts (arXiv:2106.09685, table 3: 25.19M of GPT-2 medium are two blocks):
neither the final norm nor the output head, which ``modules_to_save`` may name; a new classification head does.
"""

import inspect
from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor, nn

from loralab.adapters.base import Adapter, AdapterSpec, Saved, SavedModule, freeze, modules_to_save, save_modules
from loralab.adapters.blocks import last_stack
from loralab.adapters.targets import within
from loralab.errors import ConfigError
from loralab.quantization.base import is_frozen, is_linear
from loralab.spec import Natural, spec


@spec("adapter")
class LastLayer(AdapterSpec):
    """Trains the last ``layers`` blocks; an encoder-decoder's are those of its decoder. 0: the new head alone."""

    packable: ClassVar[bool] = True
    tokenwise: ClassVar[bool] = True
    layerwise: ClassVar[bool] = True

    layers: Natural = 1
    modules_to_save: Saved = None

    @property
    def method(self) -> str:
        return "last_layer"

    def attach(self, model: nn.Module, seed: int = 0) -> Adapter:
        freeze(model)
        adapter = self.makes(model, self)
        saved = modules_to_save(model, self.modules_to_save)
        for name in trained_leaves(model, self.layers) if self.layers else ():
            if not within(name, saved):
                adapter.add(name, LeafCopy(model.get_submodule(name)))
        save_modules(adapter, model, self.modules_to_save, seed)
        return adapter


class LeafCopy(SavedModule):
    """A copy that is given its positions in one row, so that its gradients are summed alike in every shape of batch."""

    def forward(self, x: Tensor, y: Tensor, key: int | None) -> Tensor:
        if not x.is_floating_point():  # an embedding is given ids
            return super().forward(x, y, key)
        flat = super().forward(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), key)
        return flat.view(y.shape)

    merged = SavedModule.merged


def trained_leaves(model: nn.Module, layers: int) -> list[str]:
    """Names of the modules that hold the parameters of the last ``layers`` blocks. Raises ConfigError."""
    blocks, whose = last_stack(model), type(model).__name__
    if blocks is None:
        raise ConfigError(
            f"adapter=last_layer: {whose} has no stack of blocks that are modules of their own, so none is the last; "
            "valid: another adapter, such as lora"
        )
    if layers > len(blocks):
        raise ConfigError(f"adapter.layers={layers}: {whose} has {len(blocks)} blocks; valid: 0 to {len(blocks)}")
    inside = next(name for name, module in model.named_modules() if module is blocks)
    last = range(len(blocks) - layers, len(blocks))
    return [name for index in last for name in _leaves(f"{inside}.{index}", blocks[index], whose)]


def _leaves(prefix: str, block: nn.Module, whose: str) -> Iterator[str]:
    for name, module in block.named_modules(prefix=prefix):
        own = list(module.named_parameters(recurse=False))
        if not own and not is_frozen(module):
            continue
        if not _replaceable(module):
            raise ConfigError(
                f"adapter=last_layer cannot train {name}.{own[0][0]} of {whose}, {tuple(own[0][1].shape)}: "
                f"{type(module).__name__} is no layer that turns one input into one output (a linear layer, an "
                "embedding, a norm), for which a copy could compute; valid: another adapter, such as lora"
            )
        yield name


def _replaceable(module: nn.Module) -> bool:
    """Whether a copy can compute in the module's place, from one tensor to one."""
    if is_linear(module) or type(module) is nn.Embedding:
        return True
    vectors = all(parameter.dim() == 1 for parameter in module.parameters())
    return vectors and not list(module.children()) and len(inspect.signature(module.forward).parameters) == 1

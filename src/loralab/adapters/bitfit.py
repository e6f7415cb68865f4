"""BitFit: the biases alone train, as differences to the frozen ones (Ben Zaken et al. 2021, arXiv:2106.10199)."""

import logging
from typing import ClassVar

from torch import nn

from loralab.adapters.base import Adapter, AdapterSpec, Saved, freeze, modules_to_save, save_modules
from loralab.adapters.biases import bias_delta, biases
from loralab.adapters.targets import within
from loralab.errors import ConfigError
from loralab.spec import spec

log = logging.getLogger(__name__)


@spec("adapter")
class BitFit(AdapterSpec):
    """Trains every bias of the base, those of its norms and of its output head with them."""

    packable: ClassVar[bool] = True
    tokenwise: ClassVar[bool] = True
    layerwise: ClassVar[bool] = True

    modules_to_save: Saved = None

    def attach(self, model: nn.Module, seed: int = 0) -> Adapter:
        freeze(model)
        adapter = self.makes(model, self)
        saved = modules_to_save(model, self.modules_to_save)
        own = {name: bias for name, bias in biases(model).items() if not within(name, saved)}
        if saved and not own:
            raise ConfigError(
                f"adapter=bitfit: {type(model).__name__} has no biases, so {', '.join(saved)} alone would train, which "
                "is no BitFit; valid: a base that has biases, or another adapter"
            )
        for name, bias in own.items():
            adapter.add(name, bias_delta(model.get_submodule(name), bias))
        save_modules(adapter, model, self.modules_to_save, seed)
        _name_unreachable(model, adapter)
        return adapter


def _name_unreachable(model: nn.Module, adapter: Adapter) -> None:
    """Warns of biases that a model adds by itself, where no layer's output shows them."""
    trained = {id(bias) for bias in biases(model).values()}
    given = [(name, one) for name, one in model.named_parameters() if name.endswith("bias")]
    left = [name for name, one in given if id(one) not in trained and not within(name, adapter.module_names)]
    if left:
        log.warning(
            "adapter=bitfit leaves %d biases as they are, since no layer adds them to its output: %s",
            *(len(left), ", ".join(left[:3])),
        )

"""The tensors of a checkpoint that bitsandbytes quantized, read from its files beside transformers' own loader."""

from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import version
from typing import Any

from torch import Tensor

from loralab.errors import ConfigError
from loralab.models import weights
from loralab.models.originals import TensorFiles
from loralab.quantization import stored
from loralab.quantization.base import Quantizer


class Held(TensorFiles):
    """The quantized layers of a checkpoint."""

    @cached_property
    def layers(self) -> dict[str, list[str]]:
        """{layer: what follows its name in the names of its tensors} of those that are quantized."""
        marks = [name.partition(f".{stored.STATE}")[0] for name in self.places if stored.STATE in name]
        marks += [name.removesuffix(".SCB") for name in self.places if name.endswith(".SCB")]
        own: dict[str, list[str]] = {name: [] for name in marks}
        for tensor in self.places:
            for stem in (tensor.rpartition(".")[0], tensor.partition(".weight")[0]):
                rest = tensor[len(stem) + 1 :]
                if stem in own and rest != "bias" and rest not in own[stem]:
                    own[stem].append(rest)
        return own

    def tensors(self, layer: str) -> dict[str, Tensor]:
        """All of a layer's but its bias."""
        return {rest: self.read(f"{layer}.{rest}") for rest in self.layers[layer]}

    def check(self, names: list[str]) -> None:
        """Raises ConfigError where the layers that this run's scheme takes are not the quantized ones."""
        if lacking := [name for name in names if name not in self.layers]:
            raise ConfigError(
                f"{self.what}: {lacking[0]} is not quantized in this checkpoint ({len(lacking)} such layers); valid: "
                f"quantization.skip_modules that names them, such as [{lacking[0].rpartition('.')[2]}]"
            )
        if beyond := sorted(set(self.layers) - set(names)):
            raise ConfigError(
                f"{self.what}: {beyond[0]} is quantized in this checkpoint, and is a layer that stays dense here; "
                "valid: the dense checkpoint that this one was made from"
            )

    def is_read(self, tensor: str) -> bool:
        """Whether a tensor that transformers found no place for is one of a quantized layer's."""
        return any(tensor == f"{layer}.{rest}" for layer, rests in self.layers.items() for rest in rests)


def held(what: str, path: str, config: Any, spec: Quantizer) -> Held | None:
    """None for a dense checkpoint. Raises ConfigError for one of another format than ``spec``, which it names; takes
    what says so out of ``config``."""
    given = getattr(config, "quantization_config", None)
    if not given:
        return None
    given = given if isinstance(given, Mapping) else given.to_dict()
    name = stored.scheme(given)
    if not stored.fits(spec, name):
        here = f" (bitsandbytes {version('bitsandbytes')} is installed)" if name else ""
        valid = f"quantization={name}, or " if name else ""
        raise ConfigError(
            f"{what} is already quantized ({weights.stored_scheme(given)}), and this run asks for quantization="
            f"{spec.name}{here}; valid: {valid}the dense checkpoint that this one was made from"
        )
    del config.quantization_config
    return Held(what, path)

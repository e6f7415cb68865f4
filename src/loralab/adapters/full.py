"""Full fine-tuning: every parameter of the base trains. The yardstick every adapter is held against."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from loralab.adapters.base import Adapter, AdapterSpec
from loralab.errors import ConfigError
from loralab.quantization.base import is_frozen
from loralab.spec import spec


@spec("adapter")
class Full(AdapterSpec):
    """Trains the base itself, so it runs alone and the base serves no other trial afterwards."""

    packable: ClassVar[bool] = False
    changes_base: ClassVar[bool] = True

    def attach(self, model: nn.Module, seed: int = 0) -> Adapter:
        packed = [name for name, module in model.named_modules() if is_frozen(module)]
        if packed:
            raise ConfigError(
                f"adapter=full cannot train the quantized layer {packed[0]} (and {len(packed) - 1} more): "
                "use quantization=none, or an adapter"
            )
        adapter = self.makes(model, self)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return adapter


class FullAdapter(Adapter):
    """Owns the base's own parameters."""

    def __init__(self, model: nn.Module, spec: AdapterSpec) -> None:
        super().__init__(model, spec)
        self.model = model

    @property
    def module_names(self) -> list[str]:
        return [name for name, module in self.model.named_modules() if list(module.parameters(recurse=False))]

    def export(self, folder: Path) -> None:
        """A model as transformers loads it."""
        self.model.save_pretrained(folder)  # type: ignore[operator]

    def restore(self, folder: Path) -> None:
        stored = type(self.model).from_pretrained(folder)  # type: ignore[attr-defined]
        self.model.load_state_dict(stored.state_dict(), strict=True)

    def merged(self, own: Callable[[str], dict[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Every layer's own parameters: the base is what was trained."""
        for name, _ in self.model.named_modules():
            yield from ((f"{name}.{one}".lstrip("."), value) for one, value in own(name).items())

    def lost(self) -> str:
        base = {id(parameter) for parameter in self.model.parameters()}
        others = [name for name, parameter in self.named_parameters() if id(parameter) not in base]
        return ", ".join(others[:3])


Full.makes = FullAdapter

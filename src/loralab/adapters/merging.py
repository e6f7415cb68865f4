"""Which adapters can be merged: those whose every part says what the base's own parameters would have to be for it."""

from torch import nn

from loralab.adapters.base import Adapter, AdapterSpec
from loralab.errors import ConfigError

COMPUTES = frozenset({"forward", "forward_grouped", "weight"})  # what a part computes with, of which ``merged`` speaks
VALID = "valid: a run of a method that changes weights or biases, such as lora, vera, ia3, bitfit, last_layer or full"


def check_spec(spec: AdapterSpec) -> None:
    """Raises ConfigError where the method as such cannot be merged; nothing needs to be loaded."""
    why = spec.unmergeable
    if not why and not spec.layerwise and spec.makes.merged is Adapter.merged:
        why = (
            f"{type(spec).__name__} does not say that it acts on single layers alone (layerwise = True), and "
            f"{spec.makes.__name__} has no `merged` of its own"
        )
    if why:
        raise ConfigError(f"adapter={spec.method} cannot be merged: {why}; {VALID}")


def check_adapter(adapter: Adapter) -> None:
    """Raises ConfigError where a part of ``adapter`` computes something of which its class does not say what it is of
    a weight."""
    check_spec(adapter.spec)
    if type(adapter).merged is not Adapter.merged:
        return
    parts = [*adapter.adapted(), *((key.replace("/", "."), module) for key, module in adapter.saved.items())]
    for name, part in parts:
        if not _says(type(part)):
            raise ConfigError(
                f"adapter={adapter.spec.method} cannot be merged: {type(part).__name__} of {name} has no `merged` that "
                f"speaks of what it computes itself; {VALID}"
            )


def _says(kind: type[nn.Module]) -> bool:
    """Whether ``merged`` is defined where the computation is, or in a class derived from that one: a parent's speaks of
    the parent's."""
    lineage = [vars(one).keys() for one in kind.__mro__]
    says = next((place for place, names in enumerate(lineage) if "merged" in names), len(lineage))
    return says <= next(place for place, names in enumerate(lineage) if COMPUTES & names)

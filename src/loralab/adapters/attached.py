"""Attaching, with doubts settled first: an adapter that trains nothing, or would lose what it trains, is refused."""

import logging
from collections.abc import Iterable

from torch import Tensor, nn

from loralab.adapters.base import Adapter, AdapterSpec
from loralab.adapters.export import check_export
from loralab.errors import ConfigError

log = logging.getLogger(__name__)


def attached(spec: AdapterSpec, model: nn.Module, seed: int = 0) -> Adapter:
    """``spec.attach(model, seed)``, with all of ``model`` frozen that the adapter does not own. Raises ConfigError."""
    adapter = spec.attach(model, seed)
    if not isinstance(adapter, Adapter):
        raise ConfigError(
            f"adapter={spec.method}: {type(spec).__name__}.attach returned {type(adapter).__name__}; valid: an Adapter"
        )
    adapter.spec = spec
    try:
        _check_base(adapter, model)
        check_parameters(adapter, model)
        check_export(adapter)
    except ConfigError:
        adapter.detach()
        raise
    owned = {id(parameter) for parameter in adapter.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in owned:
            parameter.requires_grad_(False)
    _name_ties(adapter, model)
    return adapter


def _name_ties(adapter: Adapter, model: nn.Module) -> None:
    """Warns of adapted layers whose weight another layer computes with as well."""
    for name, other in ties(model, adapter.layers()) if not adapter.spec.changes_base else []:
        log.warning(
            "adapter=%s: the weight of %s is also that of %s, which stays the base's (as PEFT has it); merged into the "
            "one weight, the update would change both. loralab merge makes two of it; to merge otherwise, untie first: "
            "%s.weight = torch.nn.Parameter(%s.weight.clone()) and config.tie_word_embeddings=False",
            *(adapter.spec.method, name, other, name, name),
        )


def ties(model: nn.Module, layers: Iterable[str]) -> list[tuple[str, str]]:
    """(layer, another one with the same weight) of those of ``layers`` whose weight is tied."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for weight in module.parameters(recurse=False):
            holders.setdefault(id(weight), []).append(name)
    shared = {name: own for own in holders.values() if len(own) > 1 for name in own}
    return [(name, next(one for one in shared[name] if one != name)) for name in layers if name in shared]


def check_parameters(adapter: Adapter, model: nn.Module) -> None:
    """There are some, and each is there to be trained."""
    spec, whose = adapter.spec, type(model).__name__
    if not any(parameter.numel() for parameter in adapter.parameters()):
        raise ConfigError(
            f"adapter={spec.method} would train nothing: it has no parameters on this base ({whose}); valid: a base "
            "that has what it trains, or another adapter"
        )
    for name, parameter in adapter.named_parameters():
        if spec.changes_base and parameter.numel() == 0:
            continue  # a base may hold empty ones
        if not parameter.numel():
            shape = tuple(parameter.shape)
            raise ConfigError(
                f"adapter={spec.method}: its parameter {name} is empty {shape}; valid: at least one value"
            )
        if not parameter.requires_grad:
            raise ConfigError(
                f"adapter={spec.method}: its parameter {name} takes no gradient, yet would be counted as trained; "
                "valid: a buffer, or requires_grad=True"
            )


def _check_base(adapter: Adapter, model: nn.Module) -> None:
    """Who trains the base's own parameters says so: no other trial may meet that base."""
    if adapter.spec.changes_base:
        return
    base = {_storage(parameter): name for name, parameter in model.named_parameters() if parameter.numel()}
    for parameter in adapter.parameters():
        if _storage(parameter) in base:
            name, kind = base[_storage(parameter)], type(adapter.spec).__name__
            raise ConfigError(
                f"adapter={adapter.spec.method} trains {name}, a parameter of the base that other trials share; valid: "
                f"`changes_base = True` in {kind}, or a difference of its own that is added to it"
            )


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)

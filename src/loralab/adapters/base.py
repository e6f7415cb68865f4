"""What an adapter is: a spec with one verb, and a module that owns everything a trial trains."""

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import torch
from annotated_types import MinLen
from pydantic import BeforeValidator
from torch import Tensor, nn

from loralab.adapters.files import WEIGHTS, read_state, write_state
from loralab.adapters.hooks import AdapterHooks
from loralab.adapters.peft import HEADS
from loralab.errors import ConfigError, nearest
from loralab.numerics.hashing import mix
from loralab.quantization.base import Quantizer, base_linears, dense_weight, is_linear, matching
from loralab.spec import spec


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


# adapter.modules_to_save; see the function
Saved = Annotated[
    list[Annotated[str, MinLen(1), "the name of a module"]] | None,
    BeforeValidator(_listed),
    "a list of module names or null",
]
STATED = ("packable", "tokenwise", "layerwise")  # each class for itself: what it does not say is false


@spec("adapter")
class AdapterSpec(ABC):
    """A method and its hyper-parameters.

    What allows a shorter way of computing (the first three) is false unless the class itself says it: a subclass that
    computes something else inherits no such promise.
    """

    packable: ClassVar[bool] = False  # several trials of it may share one pass through the base
    tokenwise: ClassVar[bool] = False  # what it adds at a token depends on nothing but that token
    layerwise: ClassVar[bool] = False  # it acts by ``add`` and ``save_module`` alone: the base below is the bare base
    size_field: ClassVar[str] = ""  # the whole number that its parameters grow with, such as r; empty: there is none
    changes_base: ClassVar[bool] = False  # the base cannot serve another trial afterwards
    start_differs: ClassVar[str] = ""  # why training does not begin at the base model; empty: it does
    unmergeable: ClassVar[str] = ""  # why no weight of the base can hold what it trains; empty: nothing forbids it
    makes: ClassVar[type["Adapter"]]  # what ``attach`` returns, whose ``export`` writes the files; Adapter

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in STATED:
            if name not in vars(cls):
                setattr(cls, name, False)

    @property
    def method(self) -> str:
        return type(self).__name__.lower()

    @property
    def virtual_tokens(self) -> int:
        """Positions of the base that it takes before those of a row's own tokens."""
        return 0

    @property
    def before_rows(self) -> tuple[str, int] | None:
        """(method, virtual tokens), which all trials of a pass have alike; None: there are none."""
        return (self.method, self.virtual_tokens) if self.virtual_tokens else None

    @property
    def why_alone(self) -> str:
        """Why its trials share no pass through the base; empty where they may."""
        return "" if self.packable else f"adapter={self.method} cannot share a pass"

    def check_quantization(self, quantization: Quantizer) -> None:  # noqa: B027 - most go with all
        """Raises ConfigError where the method cannot train over a base quantized by ``quantization``."""

    @abstractmethod
    def attach(self, model: nn.Module, seed: int = 0) -> "Adapter":
        """Freezes ``model`` and returns the trial's trainable parameters, hooked onto it; ``seed`` draws them."""


class Adapter(nn.Module):
    """A trial's trainable parameters. Its ``parameters()`` and ``state_dict()`` are all that is optimized and kept."""

    def __init__(self, model: nn.Module, spec: AdapterSpec) -> None:
        super().__init__()
        self.spec = spec
        self.deltas = nn.ModuleDict()
        self.saved = nn.ModuleDict()
        self._hooks = AdapterHooks.of(model)
        self._model = [model]  # in a list: the base is not a submodule
        self.note = ""  # what a record should say of its start; empty: nothing

    def add(self, name: str, delta: nn.Module, before: bool = False) -> None:
        """Lets ``delta`` change what layer ``name`` of the base gives; ``before``: what it is given."""
        key = name.replace(".", "/")
        if key not in self.deltas:
            self.deltas[key] = nn.ModuleList()
        cast(nn.ModuleList, self.deltas[key]).append(delta)
        self._hooks.attach(self._model[0], name, self, delta, before)

    def save_module(self, name: str, module: nn.Module) -> None:
        """Trains a copy of layer ``name`` in its place (a new classification head)."""
        copied = SavedModule(module)
        self.saved[name.replace(".", "/")] = copied
        self._hooks.attach(self._model[0], name, self, copied)

    def adapted(self) -> Iterator[tuple[str, nn.Module]]:
        """(layer name, delta) of every delta, in the order they were added."""
        for key, deltas in self.deltas.items():
            for delta in cast(nn.ModuleList, deltas):
                yield key.replace("/", "."), delta

    def saved_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """(layer name, trained copy) of every module trained whole."""
        for key, module in self.saved.items():
            yield key.replace("/", "."), cast(SavedModule, module).module

    def merged(self, own: Callable[[str], dict[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """(name, value) of every parameter of the base that would have to change for the bare base to compute what it
        computes with this adapter, whatever the values of ``own``.

        ``own``: name of a layer -> its parameters. They and the values are float32, a linear layer's weight as (out,
        in). Only for an adapter that ``merging.check_adapter`` lets pass.
        """
        for key, deltas in self.deltas.items():
            name = key.replace("/", ".")
            before = own(name)
            after = dict(before)
            for delta in cast(nn.ModuleList, deltas):
                after.update(delta.merged(after))  # type: ignore[operator]
            yield from ((f"{name}.{one}", value) for one, value in after.items() if value is not before.get(one))
        for key, module in self.saved.items():
            for one, value in cast(SavedModule, module).merged({}).items():
                yield f"{key.replace('/', '.')}.{one}", value

    @property
    def module_names(self) -> list[str]:
        """Names of the adapted layers, then of those trained whole."""
        return [*dict(self.adapted()), *dict(self.saved_modules())]

    def trainable_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def detach(self) -> None:
        """Takes the hooks off the base; the parameters stay."""
        self._hooks.detach(self)

    def layers(self) -> list[str]:
        """Names of the layers of the base that it has hooks on."""
        return self._hooks.layers_of(self)

    def never_called(self) -> list[str]:
        """Names of its layers that the base, since their hooks were set, has not called once."""
        return self._hooks.never_called(self)

    def export(self, folder: Path) -> None:
        """Writes all that was trained below ``folder``, which is there and empty: its ``state_dict`` as safetensors.

        A method that other libraries know overrides this and ``restore``. An override counts for its own class only.
        """
        write_state(self.state_dict(), folder / WEIGHTS)

    def restore(self, folder: Path) -> None:
        """Takes up what ``export`` wrote, strictly. Raises ArtifactError, or RuntimeError as ``load_state_dict``."""
        self.load_state_dict(read_state(folder / WEIGHTS), strict=True)

    def lost(self) -> str:
        """What ``export`` of this very class would leave out of the files; empty: nothing."""
        return ""


AdapterSpec.makes = Adapter


class SavedModule(nn.Module):
    """Computes with its own trainable copy of a base module, in that module's place."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        from loralab.adapters.copies import trainable_copy  # needs transformers, which a wrong setting does not

        self.module = trainable_copy(module)

    def forward(self, x: Tensor, y: Tensor, key: int | None) -> Tensor:
        cast = x.is_floating_point() and not torch.is_autocast_enabled(x.device.type)  # embeddings are given ids
        own: Tensor = self.module(x.to(next(self.module.parameters()).dtype) if cast else x)
        return own.to(y.dtype)

    def merged(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every parameter of the copy, by its name within it."""
        found = {name: parameter.detach() for name, parameter in self.module.named_parameters(remove_duplicate=False)}
        weights = {f"{name}.weight".lstrip("."): part for name, part in self.module.named_modules()}
        return {name: dense_weight(weights[name]).detach() if name in weights else one for name, one in found.items()}


def freeze(model: nn.Module) -> None:
    """No parameter of the base receives a gradient."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def generator_for(seed: int, name: str) -> torch.Generator:
    """Draws a layer's start from (seed, layer name): the same whatever else is adapted beside it."""
    words = [int.from_bytes(name.encode()[i : i + 7], "little") for i in range(0, len(name), 7)]
    return torch.Generator().manual_seed(mix(seed, *words))


def save_modules(adapter: Adapter, model: nn.Module, names: Iterable[str] | None, seed: int) -> None:
    """``modules_to_save``: the names given, else what the checkpoint of a classifier did not hold."""
    heads = new_heads(model)
    for name in modules_to_save(model, names):
        adapter.save_module(name, model.get_submodule(name))
        if name in heads:
            _draw_again(model, adapter.saved[name.replace(".", "/")].module, seed, name)  # type: ignore[arg-type]


def _check_trainable(name: str, module: nn.Module) -> None:
    kind = type(module).__name__
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        raise ConfigError(f"adapter.modules_to_save: {name} is a {kind}, which is never called; valid: modules in it")
    if not any(True for _ in module.parameters()):
        raise ConfigError(f"adapter.modules_to_save: {name} ({kind}) has no parameters; valid: a module that has some")


def modules_to_save(model: nn.Module, names: Iterable[str] | None) -> list[str]:
    """Names of the modules that ``save_modules`` trains whole: new ones; or those given and, as PEFT has it, a new
    ``classifier`` or ``score``; or none, for an empty list."""
    if names is None:
        return new_heads(model)
    given = [name for entry in names for name in _named(model, entry)]
    for name in given:
        _check_trainable(name, model.get_submodule(name))
    heads = [name for name in new_heads(model) if name in HEADS] if given else []
    return list(dict.fromkeys([*given, *heads]))


def new_heads(model: nn.Module) -> list[str]:
    """Direct children outside the base model that hold newly drawn parameters (``AdapterHooks.new_parameters``), and
    inside it those that the checkpoint did not hold at all: the pooler over a masked language model."""
    fresh = AdapterHooks.of(model).new_parameters
    base: nn.Module = getattr(model, "base_model", model)
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if base is model:
        return []
    inner = f"{model.base_model_prefix}."
    parts = [f"{inner}{name}" for name, child in base.named_children() if _new(child, inner + name, fresh)]
    outside = [name for name, child in model.named_children() if child not in (base, output)]
    return parts + [name for name in outside if any(key.startswith(f"{name}.") for key in fresh)]


def _new(module: nn.Module, name: str, fresh: frozenset[str]) -> bool:
    keys = [f"{name}.{inside}" for inside, _ in module.named_parameters()]
    return bool(keys) and all(key in fresh for key in keys)


def _draw_again(model: nn.Module, module: nn.Module, seed: int, name: str) -> None:
    if any(parameter.is_meta for parameter in module.parameters()):
        return
    with torch.random.fork_rng():
        torch.manual_seed(mix(seed, len(name), *name.encode()))
        for part in module.modules():
            model._init_weights(part)  # type: ignore[operator]


def _named(model: nn.Module, entry: str) -> list[str]:
    names = [name for name, _ in model.named_modules() if name == entry or name.endswith(f".{entry}")]
    if not names:
        leaves = {name.rpartition(".")[2] for name, _ in model.named_modules() if name}
        raise ConfigError(f"adapter.modules_to_save: no module is called {entry!r}; {nearest(entry, leaves)}")
    return names


def match_targets(
    model: nn.Module, target_modules: Any, adaptable: Callable[[nn.Module], bool] = is_linear
) -> list[str]:
    """Names of the layers to adapt, in the model's order.

    ``all-linear``: every Linear or Conv1D of the base model, never the LM or a classification head; a list: layers
    whose name is, or ends in, one of the entries; any other string: a regular expression on the whole name (PEFT's
    rules), of layers that are ``adaptable``. Raises ConfigError where nothing matches, naming what there is.
    """
    if target_modules == "all-linear":
        return base_linears(model)
    linears = [name for name, module in model.named_modules() if adaptable(module)]
    if isinstance(target_modules, str):
        _check_regex(target_modules)
        found = matching(target_modules, linears, "adapter.target_modules")
        missing = [] if found else [target_modules]
    else:
        entries = [str(entry) for entry in target_modules]
        found = [name for name in linears if any(_ends(name, entry) for entry in entries)]
        missing = [entry for entry in entries if not any(_ends(name, entry) for name in linears)]
    if missing or not found:
        _nothing_matches(model, missing, linears)
    return found


def outside(targets: list[str], saved: Iterable[str]) -> list[str]:
    """Those of ``targets`` that no module of ``saved`` holds, whose copy is computed with in their place. Raises
    ConfigError where none is left."""
    held = {name: whole for name in targets for whole in saved if f"{name}.".startswith(f"{whole}.")}
    if targets and len(held) == len(targets):
        name, whole = next(iter(held.items()))
        raise ConfigError(
            f"adapter.target_modules: {name} lies in {whole}, which adapter.modules_to_save trains whole, and so does "
            "every other layer that matches; valid: layers outside of it"
        )
    return [name for name in targets if name not in held]


def _check_regex(pattern: str) -> None:
    """As PEFT will read it."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"adapter.target_modules={pattern!r} is not a valid regular expression ({error})") from error


def _ends(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def _nothing_matches(model: nn.Module, missing: list[str], linears: list[str]) -> None:
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    for entry in missing:
        others = sorted({kind for name, kind in kinds.items() if _ends(name, entry)} - {"Linear", "Conv1D"})
        if others and not any(_ends(name, entry) for name in linears):
            raise ConfigError(
                f"adapter.target_modules: {entry!r} is of type {others[0]}; valid: Linear and Conv1D, and the "
                "Embedding of the tokens by adapter=lora, with a drawn start and without use_dora"
            )
    leaves = Counter(name.rpartition(".")[2] for name in linears)
    listing = ", ".join(f"{leaf} (x{count})" for leaf, count in leaves.items())
    hint = nearest(missing[0], leaves) if missing else ""
    hint = hint.split("valid:")[0]
    raise ConfigError(
        f"adapter.target_modules: {', '.join(map(repr, missing)) or 'an empty list'} matches no linear layer of "
        f"{type(model).__name__}; {hint}there are: {listing}; or all-linear"
    )

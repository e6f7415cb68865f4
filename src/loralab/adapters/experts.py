"""LoRA on experts that are one parameter of three dimensions: each gains its own scaling * B A (PEFT's
``target_parameters``). A module computes with W + scaling B A in place of W, whatever it does with it."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from loralab.adapters.base import generator_for
from loralab.adapters.hooks import AdapterHooks, Hook, NotPackable
from loralab.adapters.low_rank import drawn
from loralab.adapters.peft import PREFIX
from loralab.errors import ConfigError, nearest
from loralab.quantization.linear import without_autocast

WHY_ALONE = "adapter.target_parameters changes weights of the base, which all rows of a pass are computed with"


class ExpertsHook(Hook):
    """Around the calls of a module: its parameters are hidden by those of the trial whose pass it is."""

    def __init__(self, hooks: AdapterHooks, layer: nn.Module, salt: int) -> None:
        super().__init__(hooks, layer, salt)
        self.handles.append(layer.register_forward_pre_hook(self._enter))
        self.handles.append(layer.register_forward_hook(self._leave, always_call=True))

    def _enter(self, layer: nn.Module, args: Any) -> None:
        owners = [part.owner for part in self.hooks.slices if part.owner in self.deltas]
        if not owners:
            return
        if len(self.hooks.slices) > 1:
            raise NotPackable(WHY_ALONE)
        self.called.update(owners)
        for delta in cast(list[LoRAExpertsDelta], self.deltas[owners[0]]):
            layer.__dict__[delta.parameter] = delta.weight(layer._parameters[delta.parameter])  # type: ignore[arg-type]

    def _leave(self, layer: nn.Module, args: Any, out: Any) -> None:
        for name in layer._parameters:
            layer.__dict__.pop(name, None)


class LoRAExpertsDelta(nn.Module):
    """The updates of all experts of one parameter: A (experts * r, in) drawn, B (out, r * experts) zero, in PEFT's
    order: A's rows by expert, then rank; B's columns by rank, then expert."""

    hook: ClassVar[type[Hook]] = ExpertsHook

    def __init__(self, parameter: str, layer: nn.Module, r: int, scaling: float) -> None:
        super().__init__()
        weight: Any = layer._parameters[parameter]
        self.parameter, self.scaling = parameter, scaling
        self.transposed = bool(getattr(layer, "is_transposed", False))  # experts are (in, out), not (out, in)
        self.experts, out_features, in_features = weight.shape
        if self.transposed:
            in_features, out_features = out_features, in_features
        self.lora_A = nn.Parameter(torch.empty(self.experts * r, in_features, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r * self.experts, device=weight.device))

    @torch.no_grad()
    def draw(self, init: str, generator: torch.Generator) -> None:
        """Fills A of every expert as LoRA draws it."""
        rows, in_features = self.lora_A.shape
        if not self.lora_A.is_meta:
            self.lora_A.copy_(drawn(init, rows, in_features, rows // self.experts, generator))

    def weight(self, frozen: Tensor) -> Tensor:
        """``frozen`` with each expert's update added, in its shape and dtype."""
        b, a = (factor.to(frozen.dtype) for factor in self.by_expert())
        left, right = (a.mT, b.mT) if self.transposed else (b, a)
        with without_autocast(frozen.device.type):
            return torch.baddbmm(frozen, left, right, alpha=self.scaling)

    def delta_weight(self) -> Tensor:
        """What merging adds to the parameter, in its shape."""
        b, a = self.by_expert()
        update = self.scaling * (b @ a)
        return update.mT if self.transposed else update

    def merged(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameter with every expert's update added."""
        return {self.parameter: own[self.parameter] + self.delta_weight()}

    def by_expert(self) -> tuple[Tensor, Tensor]:
        """B (experts, out, r) and A (experts, r, in)."""
        b = self.lora_B.view(len(self.lora_B), -1, self.experts).permute(2, 0, 1)
        return b, self.lora_A.view(self.experts, -1, self.lora_A.shape[1])


def check_fields(spec: Any) -> None:
    """Raises ConfigError for fields of a LoRA that do not go with its ``target_parameters``, or lack them."""
    if spec.target_parameters is None:
        if spec.target_modules is None:
            raise ConfigError("adapter.target_modules=null goes with adapter.target_parameters; valid: all-linear")
        return
    without: dict[str, list[Any]] = {
        "lora_dropout": [0.0],
        "use_dora": [False],
        "init_lora_weights": ["kaiming", "gaussian"],
    }
    for name, valid in without.items():
        if (value := getattr(spec, name)) not in valid:
            raise ConfigError(
                f"adapter.{name}={value} does not go with adapter.target_parameters, which changes weights before they "
                f"are used (as in PEFT); valid: {' or '.join(map(str, valid))}"
            )


def add_deltas(adapter: Any, spec: Any, model: nn.Module, seed: int) -> None:
    """Attaches to ``adapter`` a delta of each of the ``target_parameters`` of the LoRA ``spec``."""
    for name in match_parameters(model, spec.target_parameters):
        module, _, parameter = name.rpartition(".")
        delta = LoRAExpertsDelta(parameter, model.get_submodule(module), spec.rank(name), spec.scaling(name))
        delta.draw(spec.init_lora_weights, generator_for(seed, name))
        adapter.add(module, delta)


def match_parameters(model: nn.Module, target_parameters: Iterable[str] | None) -> list[str]:
    """Names of the parameters that are, or end in, an entry, in the model's order. Raises ConfigError for an entry that
    names none, or one that is not of three dimensions."""
    dimensions = {name: parameter.dim() for name, parameter in model.named_parameters()}
    experts = [name for name, count in dimensions.items() if count == 3]
    chosen: set[str] = set()
    for entry in target_parameters or ():
        found = {name for name in dimensions if name == entry or name.endswith(f".{entry}")}
        if odd := sorted(found - set(experts)):
            raise ConfigError(
                f"adapter.target_parameters: {odd[0]} has {dimensions[odd[0]]} dimensions; valid: parameters of three "
                "(experts, out, in), while linear layers are named by adapter.target_modules"
            )
        if not found:
            leaves = {".".join(name.split(".")[-2:]) for name in experts}
            raise ConfigError(
                f"adapter.target_parameters: {entry!r} is no parameter of {type(model).__name__}; "
                f"{nearest(entry, leaves) if leaves else 'it has none of three dimensions; valid: null'}"
            )
        chosen |= found
    return [name for name in experts if name in chosen]


def peft_state(adapted: Iterable[tuple[str, nn.Module]]) -> dict[str, nn.Parameter]:
    """{PEFT's name: A or B} of the experts among ``adapted``. PEFT wraps a module once for each of its parameters, the
    last one outermost."""
    deltas = [(name, delta) for name, delta in adapted if isinstance(delta, LoRAExpertsDelta)]
    found: dict[str, nn.Parameter] = {}
    for place, (name, delta) in enumerate(deltas):
        inside = ".base_layer" * sum(other == name for other, _ in deltas[place + 1 :])
        for factor in ("lora_A", "lora_B"):
            found[f"{PREFIX}{name}{inside}.{factor}.weight"] = delta.get_parameter(factor)
    return found

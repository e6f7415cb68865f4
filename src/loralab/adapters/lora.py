"""LoRA: y = W x + (lora_alpha / r) B A x with W frozen (Hu et al. 2021, arXiv:2106.09685, equation 3)."""

import logging
import math
import re
from collections import Counter
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Le
from pydantic import BeforeValidator
from torch import Tensor, nn

from loralab.adapters import decomposed, embedding, experts, peft
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
from loralab.adapters.biases import BiasDelta, ChannelBiasDelta, bias_delta, biases
from loralab.adapters.embedding import LoRAEmbeddingDelta
from loralab.adapters.files import WEIGHTS, read_state
from loralab.adapters.low_rank import DoRADelta, LoRADelta, PiSSADelta
from loralab.adapters.targets import Indexes, Names, TargetsOrNull, of_blocks, within, without_excluded
from loralab.errors import ArtifactError, ConfigError, nearest
from loralab.quantization.base import Quantizer, is_linear, linear_shape
from loralab.spec import Positive, Share, Whole, spec

log = logging.getLogger(__name__)

Rank = Annotated[Whole, Ge(1), Le(2**31 - 1)]
Start = Annotated[
    Literal["kaiming", "gaussian", "orthogonal", "pissa", "loftq", "eva"],
    BeforeValidator(lambda value: "kaiming" if value is True else value),  # PEFT's word for it
]


@spec("adapter")
class LoRA(AdapterSpec):
    """Low-rank adaptation. ``rank_pattern`` and ``alpha_pattern`` map a name's ending or regex to an r, an alpha.

    A method derived from it overrides ``delta``, and names in ``makes`` what writes its files.
    """

    packable: ClassVar[bool] = True
    tokenwise: ClassVar[bool] = True
    layerwise: ClassVar[bool] = True
    size_field: ClassVar[str] = "r"

    r: Rank = 8
    lora_alpha: Positive = 16.0
    lora_dropout: Share = 0.0
    target_modules: TargetsOrNull = "all-linear"  # null: none but target_parameters
    target_parameters: Names | None = None  # experts that are one parameter of three dimensions (PEFT's word)
    use_rslora: bool = False  # lora_alpha / sqrt(r) in place of lora_alpha / r (arXiv:2312.03732)
    use_dora: bool = False  # a trained length for each row of W + B A (arXiv:2402.09353)
    # of A: loralib's and PEFT's (true); the paper's (4.1); with B, such that B A = 0 up to rounding; see decomposed.py
    init_lora_weights: Start = "kaiming"
    exclude_modules: TargetsOrNull = None
    layers_to_transform: Indexes = None
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: Saved = None
    rank_pattern: dict[str, Rank] = field(default_factory=dict)
    alpha_pattern: dict[str, Positive] = field(default_factory=dict)

    def __post_init__(self) -> None:
        experts.check_fields(self)
        by_regex = isinstance(self.target_modules, str)
        if self.layers_to_transform is not None and self.target_modules != "all-linear" and by_regex:
            raise ConfigError(
                f"adapter.layers_to_transform={self.layers_to_transform} goes with a list of target_modules or "
                f"all-linear, not with the regular expression {self.target_modules!r}, which can name the blocks itself"
            )
        odd = [r for r in (self.r, *self.rank_pattern.values()) if r % 2]
        if self.init_lora_weights == "orthogonal" and odd:
            raise ConfigError(
                f"adapter.init_lora_weights=orthogonal halves each rank and cannot begin with r={odd[0]}; valid: even "
                "ranks"
            )
        if self.init_lora_weights == "pissa" and self.use_dora:
            raise ConfigError(
                "adapter.use_dora=true does not go with adapter.init_lora_weights=pissa: DoRA rescales the rows of the "
                "base's weight with B A added, and PiSSA's B A is at first a part of that weight; valid: one of the two"
            )

    @property  # type: ignore[misc]
    def start_differs(self) -> str:  # type: ignore[override]
        """LoftQ begins nearer to the base before its quantization."""
        return "B A begins as what quantization lost" if self.init_lora_weights == "loftq" else ""

    def check_quantization(self, quantization: Quantizer) -> None:
        if self.init_lora_weights == "loftq" and quantization.name == "none":
            raise ConfigError(decomposed.NO_ERROR)

    @property
    def why_alone(self) -> str:
        return experts.WHY_ALONE if self.target_parameters else super().why_alone

    def rank(self, name: str) -> int:
        """The rank of layer ``name``."""
        return int(_lookup(self.rank_pattern, name, self.r))

    def scaling(self, name: str) -> float:
        """lora_alpha / r of layer ``name``, or lora_alpha / sqrt(r) with rsLoRA."""
        r = self.rank(name)
        return self.alpha(name) / (math.sqrt(r) if self.use_rslora else r)

    def alpha(self, name: str) -> float:
        """lora_alpha of layer ``name``."""
        return _lookup(self.alpha_pattern, name, self.lora_alpha)

    @property
    def plain_rank(self) -> int:
        """How many times r the rank of the plain LoRA in its files is."""
        return 2 if self.init_lora_weights == "pissa" else 1

    def attach(self, model: nn.Module, seed: int = 0) -> Adapter:
        freeze(model)
        adapter = self.makes(model, self)
        names = outside(self._targets(model), modules_to_save(model, self.modules_to_save))
        shapes = {name: embedding.adapted_shape(model.get_submodule(name)) for name in names}
        self._check_patterns([*names, *experts.match_parameters(model, self.target_parameters)])
        self._warn_of_ranks(shapes)
        _warn_of_misread(model, names)
        for name in names:
            delta = self.delta(name, model.get_submodule(name), next(model.parameters()).device)
            delta.draw(self.init_lora_weights, generator_for(seed, name))
            adapter.add(name, delta)
        experts.add_deltas(adapter, self, model, seed)
        if self.init_lora_weights in ("pissa", "loftq", "eva"):
            adapter.note = decomposed.begin(self.init_lora_weights, model, dict(adapter.adapted()))
        save_modules(adapter, model, self.modules_to_save, seed)
        self._train_biases(model, adapter, names)
        return adapter

    def _targets(self, model: nn.Module) -> list[str]:
        if self.target_modules is None:
            return []
        drawn = not self.use_dora and self.init_lora_weights in ("kaiming", "gaussian", "orthogonal")
        plain = drawn and type(self).delta is LoRA.delta  # which alone knows of embeddings
        matched = match_targets(model, self.target_modules, embedding.linear_or_tokens(model) if plain else is_linear)
        found = without_excluded(matched, self.exclude_modules)
        return of_blocks(found, self.layers_to_transform)

    def delta(self, name: str, layer: nn.Module, device: torch.device) -> "LoRADelta | LoRAEmbeddingDelta":
        """What is trained at ``layer``, called ``name``; its start is drawn afterwards."""
        if isinstance(layer, nn.Embedding):
            return LoRAEmbeddingDelta(layer, self.rank(name), self.scaling(name), device)
        out_features, in_features = linear_shape(layer)
        kind = DoRADelta if self.use_dora else PiSSADelta if self.init_lora_weights == "pissa" else LoRADelta
        made = kind(in_features, out_features, self.rank(name), self.scaling(name), self.lora_dropout, device)
        return made.over(layer) if isinstance(made, DoRADelta) else made

    def _check_patterns(self, names: list[str]) -> None:
        """Raises ConfigError for a key that no adapted layer answers to."""
        for field_name in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, field_name):
                try:
                    found = any(_answers(name, key) for name in names)
                except re.error as error:
                    raise ConfigError(f"adapter.{field_name}: {key!r} is no regular expression ({error})") from error
                if not found:
                    leaves = {name.rpartition(".")[2] for name in names}
                    raise ConfigError(f"adapter.{field_name}: {key!r} matches no adapted layer; {nearest(key, leaves)}")

    def _warn_of_ranks(self, shapes: dict[str, tuple[int, int]]) -> None:
        wide = [name for name, shape in shapes.items() if self.rank(name) > min(shape)]
        if wide:
            log.warning(
                "adapter.r=%d exceeds the smaller dimension of %d of %d layers (%s is %d x %d): the rank of an update "
                "cannot be larger than that",
                *(self.rank(wide[0]), len(wide), len(shapes), wide[0], *shapes[wide[0]]),
            )

    def _train_biases(self, model: nn.Module, adapter: Adapter, names: list[str]) -> None:
        if self.bias == "none":
            return
        whole = [name for name, _ in adapter.saved_modules()]  # a copy is computed in their place, biases and all
        chosen = {name: bias for name, bias in biases(model).items() if self.bias == "all" or name in names}
        trained = {name: bias for name, bias in chosen.items() if not within(name, whole)}
        for name, bias in trained.items():
            adapter.add(name, bias_delta(model.get_submodule(name), bias))
        if not trained:
            log.warning("adapter.bias=%s has no effect: none of these layers of the base has a bias", self.bias)


class LoRAAdapter(Adapter):
    """LoRA's deltas, biases and heads; on disk they are PEFT's, which computes the same logits from them."""

    def __init__(self, model: nn.Module, spec: LoRA) -> None:
        super().__init__(model, spec)
        self.lora = spec

    def export(self, folder: Path) -> None:
        peft.write(folder, self.peft_config(), self.peft_state())

    def restore(self, folder: Path) -> None:
        stored, own = read_state(folder / WEIGHTS), self.peft_state()
        wrong = sorted(set(stored) ^ set(own)) or [key for key in own if stored[key].shape != own[key].shape]
        if wrong:
            raise ArtifactError(f"{folder / WEIGHTS} and {type(self._model[0]).__name__} do not agree in {wrong[0]}")
        with torch.no_grad():
            for name, delta in self._factors().items():
                delta.restore(*(stored[key] for key in peft.lora_keys(name)))
                if isinstance(delta, DoRADelta):
                    delta.lora_magnitude_vector.copy_(stored[peft.magnitude_key(name)])
            for key, factor in self._of_tables_and_experts().items():
                factor.copy_(stored[key])
            for key, (bias, shift) in self._biases().items():
                shift.bias_delta.copy_(stored[key].to(bias.device) - bias)
        for name, module in self.saved_modules():
            module.load_state_dict({inside: stored[key] for key, inside in peft.saved_keys(name, module).items()})

    def lost(self) -> str:
        if type(self.lora) is not LoRA:
            return f"what {type(self.lora).__name__} changes in LoRA"
        deltas = [(name, type(delta)) for name, delta in self.adapted()]
        # experts have a delta for each of their two parameters
        given = [(name, kind) for name, kind in deltas if kind is not experts.LoRAExpertsDelta]
        strange = [
            f"{kind.__name__} of {name}"
            for name, kind in given
            if kind not in (LoRADelta, DoRADelta, PiSSADelta, LoRAEmbeddingDelta, BiasDelta, ChannelBiasDelta)
        ]
        strange += [f"the second {kind.__name__} of {name}" for (name, kind), n in Counter(given).items() if n > 1]
        strange += [name for name, _ in self.named_parameters() if not name.startswith(("deltas.", "saved."))]
        return strange[0] if strange else ""

    def _factors(self) -> dict[str, "LoRADelta"]:
        return {name: delta for name, delta in self.adapted() if isinstance(delta, LoRADelta)}

    def _of_tables_and_experts(self) -> dict[str, nn.Parameter]:
        """{PEFT's name: A or B}, which PEFT's files hold as they are."""
        return {**embedding.peft_state(self.adapted()), **experts.peft_state(self.adapted())}

    def _low_rank(self) -> dict[str, Tensor]:
        """{PEFT's name: tensor} of what is trained beside biases and whole modules."""
        found: dict[str, Tensor] = {**self._of_tables_and_experts()}
        for name, delta in self._factors().items():
            found.update(zip(peft.lora_keys(name), delta.plain_factors(), strict=True))
            if isinstance(delta, DoRADelta):
                found[peft.magnitude_key(name)] = delta.lora_magnitude_vector
        return found

    def _biases(self) -> dict[str, tuple[Tensor, BiasDelta]]:
        """{PEFT's name: (the base's bias, what was added to it)}."""
        adapted, model = self._factors(), self._model[0]
        trained = {name: delta for name, delta in self.adapted() if isinstance(delta, BiasDelta)}
        biases: dict[str, Any] = {name: model.get_submodule(name).bias for name in trained}
        return {peft.bias_key(name, name in adapted): (biases[name], delta) for name, delta in trained.items()}

    def peft_config(self) -> dict[str, Any]:
        """What adapter_config.json holds."""
        saved = [name for name, _ in self.saved_modules()]
        parameters = experts.match_parameters(self._model[0], self.lora.target_parameters)
        kinds = LoRADelta | LoRAEmbeddingDelta
        layers = [name for name, delta in self.adapted() if isinstance(delta, kinds)]
        return peft.lora_config(self.lora, layers, self._model[0], saved, parameters)

    def peft_state(self) -> dict[str, Tensor]:
        """PEFT's names for every tensor the trial trained."""
        state: dict[str, Tensor] = {**self._low_rank()}
        state.update({key: bias + delta.bias_delta for key, (bias, delta) in self._biases().items()})
        for name, module in self.saved_modules():
            own = module.state_dict()
            state.update({key: own[name] for key, name in peft.saved_keys(name, module).items()})
        return {**peft.frozen_heads(self), **state}


LoRA.makes = LoRAAdapter


def _warn_of_misread(model: nn.Module, names: list[str]) -> None:
    if others := peft.misread(model, names):
        log.warning(
            "PEFT does not load what is trained at %d of the %d layers (%s, ...): under transformers 5 it takes them "
            "for the experts of %s, whatever their name says; the files hold it, and loralab loads it",
            *(len(others), len(names), others[0], type(model).__name__),
        )


def _answers(name: str, key: str) -> bool:
    """Whether a pattern's key is meant for layer ``name`` (PEFT's rule)."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


def _lookup(pattern: dict[str, Any], name: str, default: float) -> float:
    return next((float(value) for key, value in pattern.items() if _answers(name, key)), default)

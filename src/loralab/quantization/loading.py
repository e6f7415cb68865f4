"""Quantizes a transformers model while it loads: each dense weight is packed as it is read, and freed at once.

transformers' loader reads the files (shards, renames, tied weights, dtype) and calls ``Stream.convert`` for the weights
that ``LoralabQuantizer`` names. Packed layers replace the dense ones at the end, because until then the loader
re-creates every buffer that is not in the state dict. The loaded model keeps no reference to the quantizer.
"""

from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from loralab.errors import ConfigError
from loralab.quantization import stored
from loralab.quantization.base import Quantizer, linear_shape, quantizable
from loralab.quantization.linear import FrozenLinear
from loralab.quantization.none import NoQuantization
from loralab.quantization.sequences import watch_if_needed

METHOD = "loralab"


class Source(Protocol):
    """The layers of a checkpoint whose files are quantized already."""

    def check(self, names: list[str]) -> None:
        """Raises ConfigError where the quantized layers are others than ``names``."""

    def tensors(self, layer: str) -> dict[str, Tensor]:
        """A layer's stored tensors, by what follows the layer's name."""


def quantization_config(spec: Quantizer, device: torch.device | str | None = None, source: Source | None = None) -> Any:
    """The argument ``quantization_config`` of ``from_pretrained``; None, for an ordinary load, with NoQuantization.

    ``device``: where weights are packed and stay; move the rest there afterwards with ``model.to(device)``. ``source``:
    the layers of a checkpoint that is quantized already, which are then not quantized here.
    """
    return None if isinstance(spec, NoQuantization) else LoralabConfig(spec, device, source)


def convert_model(model: nn.Module, spec: Quantizer, device: torch.device | str | None = None) -> list[str]:
    """Quantizes a model that has its weights, in place; returns the names of the converted layers.

    ``device``: where each layer is packed and stays; None: its own device. The rest of the model is not moved.
    """
    names = quantizable(model, spec)
    check_all(model, spec, names)
    for name in names:
        layer = model.get_submodule(name)
        layer = layer if device is None else layer.to(device)
        replace(model, {id(layer): spec.convert(layer, name)})
    watch_if_needed(model)
    return names


def check_all(model: nn.Module, spec: Quantizer, names: list[str]) -> None:
    """Raises ConfigError where ``spec`` cannot quantize a layer of ``names``, or there is none; reads no weight."""
    if not names and not isinstance(spec, NoQuantization):
        raise ConfigError(
            f"quantization={spec.name} finds no linear layer to quantize in {type(model).__name__}; valid:"
            f" quantization=none, or fewer quantization.skip_modules (now {spec.skip_modules})"
        )
    for name in names:
        spec.check(name, *linear_shape(model.get_submodule(name)))


def replace(model: nn.Module, frozen: dict[int, nn.Module]) -> None:
    """Replaces modules of ``model`` under each of their names; ``frozen``: {id of the old module: the new one}."""
    names = [(name, id(m)) for name, m in model.named_modules(remove_duplicate=False) if id(m) in frozen]
    for name, old in names:
        model.set_submodule(name, frozen[old])


@register_quantization_config(METHOD)
class LoralabConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Passes the spec through ``from_pretrained`` to LoralabQuantizer."""

    def __init__(self, spec: Quantizer, device: torch.device | str | None = None, source: Source | None = None) -> None:
        self.quant_method = METHOD
        self.spec, self.device, self.source = spec, device, source

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, "name": self.spec.name, **asdict(self.spec)}


@register_quantizer(METHOD)
class LoralabQuantizer(HfQuantizer):  # type: ignore[misc]
    """Tells transformers' loader which weights to pack, and replaces the layers at the end."""

    def __init__(self, quantization_config: LoralabConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.spec, self.device = quantization_config.spec, quantization_config.device
        self.source = quantization_config.source
        self.names: list[str] = []
        self.frozen: dict[str, nn.Module] = {}
        self.keys: dict[str, str | None] = {}
        self.error: Exception | None = None

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self.names = quantizable(model, self.spec)
        check_all(model, self.spec, self.names)
        if self.source is not None:
            self.source.check(self.names)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        layer, _, parameter = param_name.rpartition(".")
        return parameter == "weight" and layer in self.names

    def get_quantize_ops(self) -> ConversionOps:
        return Stream(self)

    def pack(self, layer: nn.Module, name: str, weight: Tensor) -> None:
        """Adds the frozen layer of ``layer``, whose weight is on meta, to ``frozen``. Raises ConfigError where the
        checkpoint's ``weight`` has another shape."""
        meta = layer.weight
        assert isinstance(meta, nn.Parameter)
        if self.source is not None:
            frozen = stored.restore(self.spec, layer, name, self.source.tensors(name))
            self.frozen[name] = frozen.to(self.device or "cpu")
            meta._is_hf_initialized = True  # type: ignore[attr-defined]
            return
        if weight.shape != meta.shape:
            raise ConfigError(
                f"model: {name}.weight is {tuple(weight.shape)} in the checkpoint and {tuple(meta.shape)} by its"
                " config.json; valid: weights and config.json of the same model"
            )
        layer.weight = nn.Parameter(weight.to(self.device or weight.device), requires_grad=False)
        self.frozen[name] = self.spec.convert(layer, name)
        layer.weight = meta
        meta._is_hf_initialized = True  # type: ignore[attr-defined]  # or transformers fills it at random

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.error is not None:
            raise self.error
        for name in self.names:
            layer = model.get_submodule(name)
            frozen = self.frozen.pop(name, None)
            if frozen is None:  # not in the file: stays dense, and in the loading info's missing_keys
                continue
            if isinstance(frozen, FrozenLinear):
                frozen.bias = layer.bias  # type: ignore[assignment]  # may have been loaded after the weight
                frozen.stored_key = self.keys[name] if self.source is None else None
            replace(model, {id(layer): frozen.train(layer.training)})
        watch_if_needed(model)
        self.remove_quantization_config(model)
        for module in model.modules():
            if hasattr(getattr(module, "config", None), "_is_quantized"):
                del module.config._is_quantized  # type: ignore[union-attr]
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class Stream(ConversionOps):  # type: ignore[misc]
    """The loader's conversion of a dense weight: packs it in the quantizer and returns nothing to the loader."""

    def __init__(self, quantizer: LoralabQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        model, missing = kwargs["model"], kwargs.get("missing_keys")
        for key, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            name = key.removesuffix(".weight")
            try:
                if self.quantizer.error is None:
                    self.quantizer.pack(model.get_submodule(name), name, weight)
                    self.quantizer.keys[name] = _source_key(key, kwargs)
            except Exception as error:  # the loader would raise a RuntimeError in its place
                self.quantizer.error = error
            if missing is not None:
                missing.discard(key)
        return {}


def _source_key(key: str, given: dict[str, Any]) -> str | None:
    """The name in the files of the tensor ``key``; None where it was cut or put together from others."""
    sources, targets = given.get("source_patterns") or [], given.get("target_patterns") or []
    return str(sources[0]) if targets == [key] and len(sources) == 1 else None

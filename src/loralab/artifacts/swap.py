"""A run's adapter merged into its base in memory, and the base given back as it was, bit for bit."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loralab.adapters.hooks import AdapterHooks
from loralab.adapters.merging import check_adapter
from loralab.artifacts.reopen import OpenRun
from loralab.artifacts.ties import Ties
from loralab.errors import ConfigError
from loralab.quantization.base import dense_weight, is_linear
from loralab.quantization.linear import FrozenLinear
from loralab.quantization.loading import replace
from loralab.quantization.sequences import watch_if_needed

log = logging.getLogger(__name__)

DENSE, DEQUANTIZED, ORIGINAL, REQUANTIZED = "merged", "dequantized", "original", "requantized"


@dataclass
class Change:
    """One merged parameter beside the base's: sums over its weights, in float64."""

    shape: list[int]
    delta: float  # squares of what the run adds to the base's value
    error: float  # squares of how far the merged value is from base + delta
    kept: float | None = None  # of a requantized weight: inner product of the change that arrived with the delta
    codes: int = 0  # of a requantized weight, and how many are not the base's
    codes_changed: int = 0


@dataclass
class Merged:
    """The base of a run with other weights; while they are not ``on``, it is the base that it was.

    ``changes``: {parameter: what became of it}. ``untied``: whether a weight of the base that two layers share is two
    weights in it.
    """

    model: nn.Module
    dtype: torch.dtype
    modules: list[tuple[nn.Module, nn.Module]] = field(default_factory=list)  # (the base's, the one in its place)
    parameters: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = field(default_factory=list)
    changes: dict[str, Change] = field(default_factory=dict)
    untied: bool = False

    def put(self) -> None:
        """Puts the merged weights into the model."""
        for owner, key, _, new in self.parameters:
            owner._parameters[key] = new
        replace(self.model, {id(old): new for old, new in self.modules})
        watch_if_needed(self.model)

    def unmerge(self) -> None:
        """Puts the base's own tensors and layers back, the very same objects; nothing is computed."""
        for owner, key, old, _ in self.parameters:
            owner._parameters[key] = old
        replace(self.model, {id(new): old for old, new in self.modules})

    @contextmanager
    def on(self) -> Iterator[None]:
        """Within, the model is the merged one, whose bare forward pass is the run's."""
        self.put()
        try:
            yield
        finally:
            self.unmerge()


class Merger:
    """Merges the adapter of one run, in each way that there is; see ``artifacts/merge.py`` for what they are."""

    def __init__(self, run: OpenRun, dtype: torch.dtype, before: nn.Module | None = None) -> None:
        """``dtype``: of the merged weights. ``before``: the base as it was, where the run has trained the base itself;
        None: it is there. Raises ConfigError for an adapter that no weights can hold."""
        check_adapter(run.adapter)
        self.run, self.model, self.dtype = run, run.model, dtype
        self.before = before or run.model
        self.frozen = {name: one for name, one in self.model.named_modules() if isinstance(one, FrozenLinear)}
        self.base_dtype: torch.dtype = self.model.dtype  # type: ignore[assignment]

    @property
    def ways(self) -> list[str]:
        """The names of the ways that there are for this base."""
        return [DEQUANTIZED, ORIGINAL, REQUANTIZED] if self.frozen else [DENSE]

    @torch.no_grad()
    def merge(self, way: str) -> Merged:
        """The adapter merged in ``way``, not yet put into the model. Raises ConfigError where the original weights
        cannot be read, the scheme cannot take a merged weight, or ``dtype`` cannot hold it."""
        made, ties = Merged(self.model, self.dtype), Ties(self.model)
        originals = self._originals() if way == ORIGINAL else {}
        placed: dict[str, nn.Parameter] = {}
        layers: dict[str, nn.Module] = {}
        exact = self.run.adapter.merged(lambda name: parameters_of(self.model, name))
        given = self.run.adapter.merged(lambda name: self._own(name, originals)) if way == ORIGINAL else None
        for name, wanted in exact:
            value = wanted if given is None else next(given)[1]
            layer, _, parameter = name.rpartition(".")
            if layer in self.frozen and parameter == "weight":
                layers[layer] = self._layer(layer, value, way)
                merged = dense_values(layers[layer])
            else:
                placed[name] = self._parameter(name, value)
                merged = self._oriented(name, placed[name]).float()
            made.changes[name] = self._change(name, wanted, merged, layers.get(layer), way)
        made.untied = ties.follow(placed)
        self._finish(made, layers, placed, originals, way)
        return made

    def _finish(
        self,
        made: Merged,
        layers: dict[str, nn.Module],
        placed: dict[str, nn.Parameter],
        originals: dict[str, Tensor],
        way: str,
    ) -> None:
        """What the adapter leaves alone, as it is written: quantized layers dense, everything in ``dtype``."""
        cast: dict[int, nn.Parameter] = {}
        for name, module in self.model.named_modules():
            new = layers.get(name)
            if new is None and name in self.frozen and way != REQUANTIZED:
                new = self._layer(name, originals.pop(name) if way == ORIGINAL else dense_values(module), way)
            for key, old in module._parameters.items():
                if old is None:
                    continue
                full = f"{name}.{key}".lstrip(".")
                value = placed[full] if full in placed else cast.setdefault(id(old), self._cast(old))
                if new is not None:
                    new._parameters[key] = value  # the bias of a layer that is replaced
                elif value is not old:
                    made.parameters.append((module, key, old, value))
            if new is not None:
                made.modules.append((module, new))

    def _originals(self) -> dict[str, Tensor]:
        """{quantized layer: its weight (out, in) before quantization}."""
        read = AdapterHooks.of(self.model).originals
        if read is None:
            raise ConfigError(
                "--onto original: nothing says where the weights of this base lie that were quantized; valid: --onto "
                "dequantized"
            )
        try:
            weights = zip(self.frozen.items(), read(self.model, list(self.frozen)), strict=True)
            return {name: weight.to(layer.packed()[0].device) for (name, layer), weight in weights}
        except ConfigError as error:  # which speaks of a start that is computed from them
            reason = str(error).partition("; valid: ")[0]
            raise ConfigError(f"--onto original: {reason}; valid: --onto dequantized") from error

    def _own(self, name: str, originals: dict[str, Tensor]) -> dict[str, Tensor]:
        own = parameters_of(self.model, name)
        return {**own, "weight": originals.pop(name).float()} if name in originals else own

    def _layer(self, name: str, weight: Tensor, way: str) -> nn.Module:
        """What stands in place of the quantized layer ``name`` with ``weight`` (out, in)."""
        layer = self.frozen[name]
        if way != REQUANTIZED:
            return _plain(layer, self._checked(f"{name}.weight", weight.to(self.dtype)))
        frozen = self.run.base.quantizer.convert(_plain(layer, weight.float()), name)
        assert isinstance(frozen, FrozenLinear)
        frozen.dense_dtype = self.dtype
        return frozen

    def _parameter(self, name: str, value: Tensor) -> nn.Parameter:
        old = self.model.get_parameter(name)
        natural = self._oriented(name, value).contiguous()
        made = nn.Parameter(self._checked(name, natural.to(self._dtype_for(old))), requires_grad=False)
        return made if made.data_ptr() != old.data_ptr() else nn.Parameter(made.clone(), requires_grad=False)

    def _checked(self, name: str, value: Tensor) -> Tensor:
        if not bool(torch.isfinite(value).all()):
            raise ConfigError(
                f"{name}, with the adapter merged into it, is not finite in {str(value.dtype).removeprefix('torch.')}; "
                "valid: --dtype float32, and a run that has not diverged"
            )
        return value

    def _oriented(self, name: str, value: Tensor) -> Tensor:
        """Between (out, in) and what the layer stores; only Conv1D stores another."""
        layer, _, parameter = name.rpartition(".")
        owner = self.model.get_submodule(layer)
        return value.t() if parameter == "weight" and isinstance(owner, Conv1D) else value

    def _dtype_for(self, parameter: Tensor) -> torch.dtype:
        """``dtype``, but for what the base keeps in float32 beside weights of 16 bits, and for numbers that are
        whole."""
        if not parameter.is_floating_point():
            return parameter.dtype
        kept = parameter.dtype == torch.float32 and self.base_dtype != torch.float32
        return torch.float32 if kept else self.dtype

    def _cast(self, old: nn.Parameter) -> nn.Parameter:
        dtype = self._dtype_for(old)
        return old if old.dtype == dtype else nn.Parameter(old.detach().to(dtype), requires_grad=False)

    def _change(self, name: str, wanted: Tensor, merged: Tensor, layer: nn.Module | None, way: str) -> Change:
        """``wanted``, what the run computes with, and ``merged``, beside the base's value."""
        owner, _, parameter = name.rpartition(".")
        base = parameters_of(self.before, owner)[parameter]
        delta, error = wanted - base, merged - wanted
        found = Change(list(wanted.shape), _product(delta, delta), _product(error, error))
        if way == REQUANTIZED and owner in self.frozen and parameter == "weight":
            found.kept = _product(merged - base, delta)
            before, after = (one.levels() for one in (self.frozen[owner], layer))  # type: ignore[union-attr, operator]
            if before is not None and after is not None:
                found.codes, found.codes_changed = before[0].numel(), int((before[0] != after[0]).sum())
        return found


def parameters_of(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The parameters of layer ``name`` alone in float32; a linear layer's weight as (out, in), dequantized."""
    layer = model.get_submodule(name)
    own = {key: one.detach().float() for key, one in layer.named_parameters(recurse=False)}
    return {**own, "weight": dense_values(layer)} if is_linear(layer) or isinstance(layer, Conv1D) else own


def dense_values(layer: nn.Module) -> Tensor:
    """The weight (out, in) of a linear layer in float32, rounded by nothing but its quantization."""
    return layer.dense(torch.float32) if isinstance(layer, FrozenLinear) else dense_weight(layer).detach().float()


def _plain(layer: FrozenLinear, weight: Tensor) -> nn.Module:
    """The layer as transformers has it, with ``weight`` (out, in) and the very same bias."""
    made: Any
    with torch.device("meta"):
        shape = layer.in_features, layer.out_features
        made = Conv1D(*reversed(shape)) if layer.transposed else nn.Linear(*shape, bias=layer.bias is not None)
    made.weight = nn.Parameter((weight.t() if layer.transposed else weight).contiguous(), requires_grad=False)
    made.bias = layer.bias
    return made.train(layer.training)  # type: ignore[no-any-return]


def _product(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum(dtype=torch.float64))

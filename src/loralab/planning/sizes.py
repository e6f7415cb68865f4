"""Bytes of weights, gradients and optimizer states from shapes alone: the model is built on the meta device."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from loralab.adapters.base import Adapter
from loralab.adapters.blocks import stack
from loralab.models import loading, pretrained
from loralab.optim.foreign import AnyOptimizer
from loralab.optim.managed import PAGED_FROM
from loralab.optim.optimizers import TORCH, UNPAGED, AdamW
from loralab.quantization.base import is_linear, linear_shape, out_of_reach_weights, quantizable, warn_out_of_reach
from loralab.training.specs import TrialSpec

EIGHT_BIT_FROM = 4096  # elements; bitsandbytes keeps smaller states in 32 bits (min_8bit_size)
EIGHT_BIT_BLOCK = 256  # states that share one float32 absmax


@dataclass(frozen=True)
class Sizes:
    """Bytes, but for ``dtype_bytes`` (of one unquantized weight), ``largest_layer`` and ``quantized`` (weights), and
    ``adapted_width``."""

    base: int
    adapter: int
    gradients: int
    optimizer: int
    paged: int  # of ``optimizer``, where managed memory can be had
    dtype_bytes: int
    largest_layer: int
    quantized: int  # weights
    adapted_width: int  # input features of all adapted layers together


def sizes(spec: TrialSpec) -> Sizes:
    """The sizes of one trial: exact, except for code tables and rounding."""
    model = skeleton(spec.model)
    dtype = spec.model.dtype if spec.model.dtype != "auto" else "float32"
    dtype_bytes = int(getattr(torch, dtype).itemsize)
    shapes = [linear_shape(model.get_submodule(name)) for name in _quantized(model, spec)]
    packed = sum(-(-spec.quantization.storage_bits(*shape) // 8) for shape in shapes)
    dense = sum(p.numel() for p in model.parameters()) - sum(out * width for out, width in shapes)
    adapter = spec.adapter.attach(model)
    trained = [p.numel() for p in adapter.parameters()]
    groups = [sum(p.numel() for p in group["params"]) for group in _unflat(spec).groups(adapter.named_parameters())]
    adapted = [model.get_submodule(name) for name in {name for name, _ in adapter.adapted()}]
    adapter.detach()
    width = dtype_bytes if spec.adapter.changes_base else 4
    trained_bytes = sum(trained) * width
    fixed_bytes = sum(buffer.nbytes for buffer in adapter.buffers())
    trained = groups if spec.optimizer.flat else trained
    states = {n: _state(spec.optimizer, n, width) for n in set(trained)}
    return Sizes(
        base=packed + dtype_bytes * dense,
        adapter=0 if spec.adapter.changes_base else trained_bytes + fixed_bytes,
        gradients=trained_bytes,
        optimizer=sum(states[n] for n in trained),
        paged=sum(states[n] for n in trained if n >= PAGED_FROM) if spec.optimizer.name in UNPAGED else 0,
        dtype_bytes=dtype_bytes,
        largest_layer=max((out * width for out, width in shapes), default=0),
        quantized=sum(out * width for out, width in shapes),
        adapted_width=sum(linear_shape(layer)[1] for layer in adapted if is_linear(layer)),
    )


def quantized_weights(spec: TrialSpec) -> int:
    """How many weights of the base are quantized."""
    model = skeleton(spec.model)
    shapes = [linear_shape(model.get_submodule(name)) for name in _quantized(model, spec)]
    return sum(out * width for out, width in shapes)


def name_what_stays(spec: pretrained.Pretrained) -> None:
    """Warns of the weights of the base that are neither quantized nor adapted, where they are many."""
    base = skeleton(spec)
    warn_out_of_reach(out_of_reach_weights(base), sum(parameter.numel() for parameter in base.parameters()))


def _unflat(spec: TrialSpec) -> AdamW | AnyOptimizer:
    optimizer = spec.optimizer
    return replace(optimizer, flat=False) if isinstance(optimizer, AdamW) else optimizer


def _state(optimizer: AdamW | AnyOptimizer, n: int, bytes_each: int) -> int:
    """Bytes of state for n parameters: two moments in their dtype (torch), in float32, or 8 bits with block absmax; of
    another optimizer about what it has for small matrices."""
    if isinstance(optimizer, AnyOptimizer):
        return optimizer.state_bytes(n, bytes_each)
    name = optimizer.name
    if name == TORCH:
        return 2 * bytes_each * n + 4
    if "8bit" not in name or n < EIGHT_BIT_FROM:
        return 8 * n
    return 2 * (n + 4 * -(-n // EIGHT_BIT_BLOCK))


def homogeneous_layers(specs: Sequence[TrialSpec]) -> int | None:
    """How many layers the stack has if all are equal, for every trial of the pack; None if they are not."""
    model = skeleton(specs[0].model)
    config: Any = model.config
    layers = stack(model)
    if layers is None or len(set(getattr(config, "layer_types", None) or [""])) > 1:
        return None
    adapters = [spec.adapter.attach(model) for spec in specs]
    prefix = next(name for name, module in model.named_modules() if module is layers)
    marks: list[set[Any]] = [  # of each layer: its parameters, quantized layers and adapters
        {(name, tuple(p.shape)) for name, p in layer.named_parameters()} for layer in layers
    ]
    for name in _quantized(model, specs[0]):
        _mark(marks, prefix, name, "packed")
    for number, adapter in enumerate(adapters):
        for name, shapes in _deltas(adapter):
            _mark(marks, prefix, name, (number, shapes))
        adapter.detach()
    return len(layers) if all(mark == marks[0] for mark in marks) else None


def _mark(marks: list[set[Any]], prefix: str, name: str, mark: Any) -> None:
    """Adds ``mark`` to the layer of the stack that holds the module ``name``."""
    if name.startswith(f"{prefix}."):
        number, _, rest = name.removeprefix(f"{prefix}.").partition(".")
        marks[int(number)].add((rest, mark))


def _deltas(adapter: Adapter) -> list[tuple[str, tuple[Any, ...]]]:
    parts: list[tuple[str, nn.Module]] = [*adapter.adapted(), *adapter.saved_modules()]
    return [(name, tuple(tuple(p.shape) for p in part.parameters())) for name, part in parts]


def _quantized(model: nn.Module, spec: TrialSpec) -> list[str]:
    return [] if spec.quantization.name == "none" else quantizable(model, spec.quantization)


def skeleton(spec: pretrained.Pretrained) -> nn.Module:
    """The base on the meta device; the last one is cached, since the trials of a sweep mostly share it."""
    key = repr(spec)
    if key not in _skeletons:
        _skeletons.clear()
        _skeletons[key] = loading.skeleton(spec)
    return _skeletons[key]


_skeletons: dict[str, nn.Module] = {}

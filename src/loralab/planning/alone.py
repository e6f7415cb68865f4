"""The predicted peak of one trial alone; two traces serve all the ranks of a sweep.

Every block of memory of a step with LoRA is linear in r, and the blocks come in the same order at every r. So the bytes
alive after each event are linear in r too, and their upper envelope gives the peak at any r. Trials where that does not
hold (8-bit or paged states, rank_pattern) are traced one by one.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loralab.adapters.hooks import AdapterHooks
from loralab.adapters.lora import LoRA
from loralab.optim.optimizers import TORCH
from loralab.planning.geometry import Geometry
from loralab.planning.kept import kept
from loralab.planning.plan import LONG, predict_step
from loralab.planning.sizes import homogeneous_layers, skeleton
from loralab.planning.trace import trace
from loralab.training.specs import TrialSpec

RANKS = (8, 32)  # that are traced; lines run through them

Line = tuple[float, float]  # bytes at r: slope, intercept


def peak(spec: TrialSpec, geometry: Geometry) -> int:
    """Peak bytes. Trials that differ only in learning rate, seed or rank share traces, also across processes."""
    key, on_disk = identity(spec, geometry.device), is_loralabs(spec)
    if not _is_linear_in_rank(spec):
        plain = (key, with_class(spec.adapter), geometry)
        return int(kept(plain, lambda: predict_step([spec], geometry).predicted_peak_bytes, on_disk))
    assert isinstance(spec.adapter, LoRA)
    adapter = dataclasses.replace(spec.adapter, r=1, lora_alpha=1.0)
    without_rank = with_class(
        adapter if adapter.plain_rank > 1 else dataclasses.replace(adapter, init_lora_weights="kaiming")
    )
    lines: list[Line] = kept((key, without_rank, geometry), lambda: _lines(spec, geometry), on_disk)
    return at(lines, spec.adapter.r)


def at(lines: Sequence[Line], r: int) -> int:
    """The value at r of the line that is highest there."""
    return round(max(slope * r + intercept for slope, intercept in lines))


def identity(spec: TrialSpec, device: str) -> tuple[Any, ...]:
    """All that decides the memory of a step on ``device`` except adapter and batch; no learning rate, seed or path."""
    model, trainer, optimizer = spec.model, spec.trainer, spec.optimizer
    settings = (type(model), model.task, model.dtype, model.gradient_checkpointing, model.attn_implementation)
    config = model._adjust(model.architecture(), None).to_json_string(use_diff=False)
    untied = model.config.get("tie_word_embeddings")
    new = sorted(AdapterHooks.of(skeleton(model)).new_parameters)  # which the files of the weights decide too
    steps = (trainer.precision_on(device), trainer.val_check_interval is None, trainer.gradient_clip_val is None)
    quantization = with_class(spec.quantization)
    optimizing = optimizer.memory_key
    return (
        *settings,
        str(model.dropout),
        model.compile,
        config,
        untied,
        *new,
        quantization,
        *optimizing,
        *steps,
        spec.data.packing,
    )


def is_loralabs(spec: TrialSpec) -> bool:
    """False for the user's classes and remote code: they may change between runs, so they are not cached on disk."""
    kinds = (type(spec.model), type(spec.quantization), type(spec.adapter), _optimizer(spec))
    return not spec.model.trust_remote_code and all(kind.__module__.startswith("loralab.") for kind in kinds)


def _optimizer(spec: TrialSpec) -> type:
    return getattr(spec.optimizer, "cls", type(spec.optimizer))


def _is_linear_in_rank(spec: TrialSpec) -> bool:
    if (
        type(spec.adapter) is not LoRA
        or spec.adapter.rank_pattern
        or spec.adapter.target_parameters
        or spec.optimizer.name not in (TORCH, "adamw_32bit")
    ):
        return False
    return (homogeneous_layers([spec]) or 0) <= LONG


def _lines(spec: TrialSpec, geometry: Geometry) -> list[Line]:
    adapters = [dataclasses.replace(spec.adapter, r=r) for r in RANKS]  # type: ignore[type-var, call-arg]
    specs = [dataclasses.replace(spec, adapter=adapter) for adapter in adapters]  # type: ignore[type-var]
    low, high = (trace([spec], geometry).levels for spec in specs)
    if low.shape != high.shape:
        raise ValueError(f"a step at r={RANKS[0]} has {len(low)} events, at r={RANKS[1]} {len(high)}")
    slopes = (high - low) / (RANKS[1] - RANKS[0])
    return envelope(slopes, low - slopes * RANKS[0])


def envelope(slopes: NDArray[np.float64], intercepts: NDArray[np.float64]) -> list[Line]:
    """The lines that are the highest at some r >= 1, by rising slope."""
    order = np.lexsort((intercepts, slopes))
    highest: list[Line] = []
    for slope, intercept in zip(slopes[order].tolist(), intercepts[order].tolist(), strict=True):
        while highest and sum(highest[-1]) <= slope + intercept:  # not higher at r=1, and less steep
            highest.pop()
        while len(highest) > 1 and _crossing(highest[-2], (slope, intercept)) <= _crossing(*highest[-2:]):
            highest.pop()
        highest.append((slope, intercept))
    return highest


def _crossing(line: Line, steeper: Line) -> float:
    """The r at which two lines meet."""
    return (line[1] - steeper[1]) / (steeper[0] - line[0]) if steeper[0] > line[0] else float("-inf")


def with_class(spec: Any) -> str:
    """repr of ``spec`` with its module: two classes may have the same name."""
    return f"{type(spec)} {spec!r}"

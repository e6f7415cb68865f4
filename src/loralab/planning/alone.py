"""The peak of one trial by itself, at the price of two traces for all the ranks of a sweep.

Every block of memory of a step with LoRA grows along a straight line in r, and the blocks come in the same order at
every r. So the bytes alive after each event are lines too, whose upper envelope gives the peak at any r, wherever the
maximum lies there. What is no such line (states in 8 bits, paged or in ranks of their own) is traced as it is.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loralab.adapters.lora import LoRA
from loralab.optim.optimizers import TORCH
from loralab.planning.kept import kept
from loralab.planning.plan import LONG, predict_step
from loralab.planning.sizes import homogeneous_layers
from loralab.planning.trace import Geometry, trace
from loralab.training.specs import TrialSpec

RANKS = (8, 32)  # that lines are drawn through

Line = tuple[float, float]  # bytes at r: slope, intercept


def peak(spec: TrialSpec, geometry: Geometry) -> int:
    """Bytes. Taken from the kept traces of this process and others where trials differ in rate, seed or rank alone."""
    key, on_disk = identity(spec), _ours(spec)
    if not _linear(spec):
        plain = (key, _named(spec.adapter), geometry)
        return int(kept(plain, lambda: predict_step([spec], geometry).predicted_peak_bytes, on_disk))
    assert isinstance(spec.adapter, LoRA)
    without_rank = _named(dataclasses.replace(spec.adapter, r=1, lora_alpha=1.0, init_lora_weights="kaiming"))
    found: list[Line] = kept((key, without_rank, geometry), lambda: _lines(spec, geometry), on_disk)
    return at(found, spec.adapter.r)


def at(lines: Sequence[Line], r: int) -> int:
    """The highest of ``lines`` at r."""
    return round(max(slope * r + intercept for slope, intercept in lines))


def identity(spec: TrialSpec) -> tuple[Any, ...]:
    """All that a step's memory follows from, beside the adapter and what it is fed; not the rate, the seed, a path."""
    model, trainer, optimizer = spec.model, spec.trainer, spec.optimizer
    built = (type(model), model.task, model.dtype, model.gradient_checkpointing, model.attn_implementation)
    config = model._adjust(model.architecture(), None).to_json_string(use_diff=False)
    untied = model.config.get("tie_word_embeddings")
    steps = (trainer.precision, trainer.val_check_interval is None, spec.trainer.gradient_clip_val is None)
    return (
        *built,
        str(model.dropout),
        config,
        untied,
        _named(spec.quantization),
        optimizer.name,
        optimizer.flat,
        *steps,
    )


def _ours(spec: TrialSpec) -> bool:
    """Whether the package's source says all; a class of the user's own, or remote code, may change between runs."""
    kinds = (type(spec.model), type(spec.quantization), type(spec.adapter))
    return not spec.model.trust_remote_code and all(kind.__module__.startswith("loralab.") for kind in kinds)


def _linear(spec: TrialSpec) -> bool:
    if type(spec.adapter) is not LoRA or spec.adapter.rank_pattern or spec.optimizer.name not in (TORCH, "adamw_32bit"):
        return False
    return (homogeneous_layers([spec]) or 0) <= LONG


def _lines(spec: TrialSpec, geometry: Geometry) -> list[Line]:
    adapters = [dataclasses.replace(spec.adapter, r=r) for r in RANKS]  # type: ignore[type-var, call-arg]
    traced = [trace([dataclasses.replace(spec, adapter=one)], geometry) for one in adapters]  # type: ignore[type-var]
    low, high = (one.levels for one in traced)
    if low.shape != high.shape:
        raise ValueError(f"a step at r={RANKS[0]} has {len(low)} events, at r={RANKS[1]} {len(high)}")
    slopes = (high - low) / (RANKS[1] - RANKS[0])
    return envelope(slopes, low - slopes * RANKS[0])


def envelope(slopes: NDArray[np.float64], intercepts: NDArray[np.float64]) -> list[Line]:
    """Those of the lines that are the highest anywhere at r >= 1, by rising slope."""
    order = np.lexsort((intercepts, slopes))
    found: list[Line] = []
    for slope, intercept in zip(slopes[order].tolist(), intercepts[order].tolist(), strict=True):
        while found and found[-1][0] + found[-1][1] <= slope + intercept:  # no higher at 1, and less steep
            found.pop()
        while len(found) > 1 and _crossing(found[-2], (slope, intercept)) <= _crossing(found[-2], found[-1]):
            found.pop()
        found.append((slope, intercept))
    return found


def _crossing(one: Line, steeper: Line) -> float:
    return (one[1] - steeper[1]) / (steeper[0] - one[0]) if steeper[0] > one[0] else float("-inf")


def _named(spec: Any) -> str:
    """Two classes of one name are two."""
    return f"{type(spec)} {spec!r}"

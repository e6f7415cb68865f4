"""EVA: A spans the directions in which a layer's inputs vary most on training rows, and B is zero.

Paischer et al. 2024, arXiv:2410.07170, section 3, with rho = 1: every layer keeps its rank.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapters.hooks import AdapterHooks
from loralab.errors import ConfigError

log = logging.getLogger(__name__)


@torch.no_grad()
def begin(model: nn.Module, deltas: Mapping[str, Any]) -> str:
    """Sets A of ``deltas`` {layer: its LoRADelta} to the first r principal directions, each of length 1; that of a
    layer which no row comes to stays drawn. Returns what a record should say. Raises ConfigError."""
    hooks = AdapterHooks.of(model)
    inputs = hooks.layer_inputs
    if inputs is None:
        raise ConfigError(
            "adapter.init_lora_weights=eva takes what enters the layers on training rows, and none are given here; "
            "valid: a run with a training split"
        )
    ranks = {name: delta.lora_A.shape[0] for name, delta in deltas.items()}
    kept: dict[tuple[Any, str], tuple[Any, Tensor]] = hooks.decomposed
    lacking = [name for name, r in ranks.items() if len(kept.get((inputs.key, name), (None, ()))[1]) < r]
    for name, covariance, count in inputs.covariances(lacking):
        if count:
            kept[inputs.key, name] = inputs, _directions(name, covariance, count, ranks[name])
    for name, delta in deltas.items():
        if (inputs.key, name) in kept:
            delta.lora_A.copy_(kept[inputs.key, name][1][: ranks[name]])
    note = "EVA: A begins as the principal directions of what enters each layer on the trial's first training rows"
    log.info("%s", note)
    return note


def _directions(name: str, covariance: Tensor, count: int, r: int) -> Tensor:
    """The eigenvectors (r, in) of the largest eigenvalues, in float32. Raises ConfigError where there are too few."""
    most = min(count - 1, len(covariance))
    if r > most:
        raise ConfigError(
            f"adapter.r={r}: what enters {name} in {count} tokens of training rows has {most} principal directions; "
            f"valid: adapter.r of at most {most}, or adapter.rank_pattern for this layer"
        )
    vectors: Tensor = torch.linalg.eigh(covariance).eigenvectors
    return vectors[:, -r:].flip(1).t().float().contiguous()

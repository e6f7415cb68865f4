"""The parameter groups of an optimizer that serves all trials of a pack."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from loralab.errors import ConfigError

LORA_B = "lora_B"  # last part of the names of the parameters whose lr is ``lr`` times ``lr_ratio``
TRIAL = "loralab_trial"  # key of a parameter group: its trial's number in the pack; absent: the group's own number


def split_groups(spec: Any, named: Iterable[tuple[str, nn.Parameter]], trial: int) -> list[dict[str, Any]]:
    """The ``groups`` of ``spec``, AdamW or another with ``lr``, ``lr_ratio`` and ``group``."""
    by_kind: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in named:
        by_kind[spec.lr_ratio != 1.0 and name.rpartition(".")[2] == LORA_B].append(parameter)
    others, lora_b = by_kind.values()
    if spec.lr_ratio == 1.0:
        return [{**spec.group(others), TRIAL: trial}]
    if not lora_b:
        raise ConfigError(
            f"optimizer.lr_ratio={spec.lr_ratio:g} is the learning rate of LoRA's B over that of A, and this "
            "adapter has no B; valid: optimizer.lr_ratio=1, or adapter=lora"
        )
    return [{**spec.group(others), TRIAL: trial}, {**spec.group(lora_b), "lr": spec.lr * spec.lr_ratio, TRIAL: trial}]


def trial_of(groups: Sequence[Mapping[str, Any]]) -> list[int]:
    """For each parameter group the number of its trial in the pack."""
    return [group.get(TRIAL, number) for number, group in enumerate(groups)]


def trial_parameters(optimizer: torch.optim.Optimizer, index: int) -> list[nn.Parameter]:
    """The parameters of the ``index``-th trial as the optimizer has them: with ``flat`` their buffers."""
    groups = optimizer.param_groups
    return [p for group, trial in zip(groups, trial_of(groups), strict=True) if trial == index for p in group["params"]]


def rate(optimizer: torch.optim.Optimizer, index: int) -> float:
    """The current learning rate of the ``index``-th trial; with ``lr_ratio`` that of all parameters but LoRA's B."""
    groups = optimizer.param_groups
    return float(groups[trial_of(groups).index(index)]["lr"])

"""loralib's state dictionaries, as microsoft/LoRA publishes its RoBERTa: A and B by the names of the base's layers."""

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loralab.adapters import peft
from loralab.artifacts.foreign import Foreign
from loralab.errors import ArtifactError, ConfigError

FACTORS = (".lora_A", ".lora_B")


def read_loralib(path: Path, lora_alpha: float | None) -> Foreign:
    """What ``torch.save(loralib.lora_state_dict(model))`` wrote, with a head trained whole where it holds one.

    The file has no lora_alpha. Nothing of a pickle but tensors is read, and no code of it is run. Raises ConfigError
    where ``lora_alpha`` is None, ArtifactError for a file of another kind.
    """
    state = _tensors(path)
    layers = list(dict.fromkeys(key.removesuffix(end) for key in state for end in FACTORS if key.endswith(end)))
    if not layers:
        raise ArtifactError(f"{path} holds no lora_A; valid: a state dictionary of loralib, or a folder of PEFT's")
    if lora_alpha is None:
        raise ConfigError(
            f"{path} holds no lora_alpha, as loralib's files do not; valid: adapter.lora_alpha=16, or what it"
            " was trained with"
        )
    r = _rank(path, state, layers)
    inside = layers[0].partition(".")[0]
    biases = [key.removesuffix(".bias") for key in state if key.startswith(f"{inside}.") and key.endswith(".bias")]
    heads = dict.fromkeys(key.partition(".")[0] for key in state if not key.startswith(f"{inside}."))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if heads else None,
        "r": r,
        "lora_alpha": lora_alpha,
        "target_modules": sorted({re.sub(r"^.*\.\d+\.", "", name) for name in layers}),
        "modules_to_save": list(heads),
        "bias": "none" if not biases else "lora_only" if set(biases) <= set(layers) else "all",
    }
    named = {_peft_name(key, layers): value for key, value in state.items()}
    return Foreign(config, named, path, f"imported from {path} (loralib)")


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise ArtifactError(
            f"{path} is damaged, or holds more than tensors, such as code, which is not run: torch.load with"
            f" weights_only=True refuses it ({type(error).__name__}); valid: a dictionary of tensors"
            " that torch.save wrote"
        ) from error
    whole = isinstance(stored, dict) and all(isinstance(value, Tensor) for value in stored.values())
    if not whole or not all(isinstance(key, str) for key in stored):
        raise ArtifactError(f"{path} holds a {type(stored).__name__}; valid: a dictionary of tensors by their names")
    return dict(stored)


def _rank(path: Path, state: dict[str, Tensor], layers: list[str]) -> int:
    """The rank of all layers. Raises ArtifactError where one has another, or A and B of one do not go together."""
    ranks = {}
    for name in layers:
        factors = [state.get(f"{name}{end}") for end in FACTORS]
        if factors[0] is None or factors[1] is None:
            raise ArtifactError(f"{path} holds only one of lora_A and lora_B of {name}")
        a, b = factors[0].shape, factors[1].shape
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise ArtifactError(
                f"{path}: lora_A of {name} is {tuple(a)} and lora_B {tuple(b)}, which is no layer of loralib's Linear"
                " (its MergedLinear, as in GPT-2's c_attn, does not say which parts of the output it changes)"
            )
        ranks[name] = int(a[0])
    first = ranks[layers[0]]
    if other := [name for name, r in ranks.items() if r != first]:
        raise ArtifactError(
            f"{path}: {layers[0]} has rank {first} and {other[0]} has {ranks[other[0]]}; valid: one rank for all layers"
        )
    return first


def _peft_name(key: str, layers: list[str]) -> str:
    name, _, last = key.rpartition(".")
    if key.endswith(FACTORS):
        return f"{peft.PREFIX}{key}.weight"
    return peft.bias_key(name, True) if last == "bias" and name in layers else f"{peft.PREFIX}{key}"

"""Trained tensors on disk: safetensors, read again after they are written."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from loralab.errors import ArtifactError, DiskError

WEIGHTS = "adapter_model.safetensors"
TEXTS = (".json", ".md", ".txt")  # suffixes of what lies beside weights


def write_state(state: Mapping[str, Tensor], path: Path) -> None:
    """Writes ``state``, each tensor with memory of its own. Raises DiskError where it does not read back equal."""
    held = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    save_file(held, path, metadata={"format": "pt"})
    with safe_open(path, "pt") as stored:  # type: ignore[no-untyped-call]
        whole = set(stored.keys()) == set(held) and all(_same(stored.get_tensor(name), held[name]) for name in held)
    if not whole:
        raise DiskError(f"{path} does not hold what was written to it")


def read_state(path: Path) -> dict[str, Tensor]:
    """What ``write_state`` wrote, on the host. Raises ArtifactError where there is none, or it is damaged."""
    try:
        with safe_open(path, "pt") as stored:  # type: ignore[no-untyped-call]
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a mapping
    except Exception as error:  # safetensors' own errors share no base
        raise ArtifactError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error


def weight_bytes(folder: Path) -> int:
    """Bytes of all files below ``folder`` that are not text."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.suffix not in TEXTS]
    return sum(file.stat().st_size for file in files)


def readable_as(file: Path) -> None:
    """Gives all files beside and below ``file`` its permissions: safetensors makes its own readable by nobody else."""
    for other in file.parent.rglob("*"):
        if other.is_file() and other != file:
            shutil.copymode(file, other)


def _same(one: Tensor, other: Tensor) -> bool:
    """To the last bit, nan included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))

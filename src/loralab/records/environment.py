"""The machine and the versions behind a record."""

import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("loralab", "torch", "lightning", "transformers", "bitsandbytes", "hydra-core", "wandb", "torchmetrics")


def environment() -> dict[str, Any]:
    """The ``environment`` part of a record: {versions, git, python, cpu, gpu, threads}.

    ``threads``: of torch's operations on a CPU; the last digits of a sum depend on it.
    """
    import torch

    return {**_machine(), "threads": torch.get_num_threads()}


@cache
def _machine() -> dict[str, Any]:
    return {
        "versions": {name: package_version(name) for name in PACKAGES},
        "git": git_state(Path.cwd()),
        "python": sys.version.split()[0],
        "cpu": cpu_name(),
        "gpu": gpu_name(),
    }


def cpu_name() -> str:
    """The processor's model name and how many logical cores this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name} x {cores}"


def gpu_name() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def git_state(folder: Path) -> str | None:
    """Commit of the folder's repository, with ``-dirty`` where tracked files differ; null outside of one."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def package_version(name: str) -> str | None:
    """The installed version of a distribution; None where there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None

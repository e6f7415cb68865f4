"""The workspace of cuBLAS. torch takes it from its allocator, so it is part of every peak on a card."""

import os
import re

import torch

# bytes: torch's defaults from compute capability 9.0 on, and below
HOPPER, BEFORE = 32 * 2**20, (2 * 4096 + 8 * 16) * 2**10
THREADS = 2  # a workspace belongs to a thread's handle: one for forward passes and updates, one for autograd's


def cublas_workspace() -> int:
    """Bytes of one workspace on this machine's card; without a card, on a Hopper. CUBLAS_WORKSPACE_CONFIG
    (``:KIB:COUNT``, repeated) is read as torch reads it."""
    if sizes := re.findall(r":([0-9]+):([0-9]+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")):
        return sum(int(size) * 2**10 * int(count) for size, count in sizes)
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return HOPPER if capability >= (9, 0) else BEFORE


def held_workspaces() -> int:
    """Bytes that a training process holds once a product has run forward and backward."""
    return THREADS * cublas_workspace()

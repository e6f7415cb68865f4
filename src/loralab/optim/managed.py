"""Optimizer state in CUDA's managed memory: asked for where the host has room, made again after a resume, given back.

bitsandbytes keeps every managed buffer until its process ends, and ends the process where the driver has none to give.
"""

import ctypes
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loralab.errors import OutOfMemory
from loralab.memory.ledgers import GIB, Host
from loralab.quantization.kernels import import_bitsandbytes

log = logging.getLogger(__name__)

PAGED_FROM = 100_000  # elements; bitsandbytes pages no smaller state tensor (Optimizer8bit.get_state_buffer)
SPARE = GIB  # bytes of host memory that paged state leaves to everything else
KEYS = ("state1", "state2")


def driver() -> Any:
    """The CUDA driver's library. Raises OSError where there is none."""
    return ctypes.CDLL("libcuda.so.1")


def page(optimizer: torch.optim.Optimizer) -> None:
    """Makes the first step of ``optimizer``, a paged one of bitsandbytes', ask for room and page a restored state: by
    then that has been loaded and moved. The step raises OutOfMemory before it changes anything."""
    started: list[bool] = []

    def before_first_step(*_: Any) -> None:
        if started:
            return
        check_room(optimizer)
        if moved := repage(optimizer):
            log.info("%d restored tensors of optimizer state are paged again", moved)
        started.append(True)

    optimizer.register_step_pre_hook(before_first_step)


def check_room(optimizer: Any) -> None:
    """Raises OutOfMemory where the host has less memory available than the state that ``optimizer`` is about to page,
    and SPARE: all of it has to lie there whenever the device needs its own."""
    wanted, available = unpaged_bytes(optimizer), Host().available()
    if wanted and available is not None and available < wanted + SPARE:
        raise OutOfMemory(
            f"a paged optimizer is about to ask for {wanted / GIB:.2f} GiB of memory that the host shares with the "
            f"device, and the host has {available / GIB:.2f} GiB available, of which {SPARE / GIB:g} GiB stay free; "
            "valid: an 8-bit one (optimizer=paged_adamw_8bit), a smaller adapter.r, or fewer trials a pass"
        )


def unpaged_bytes(optimizer: Any) -> int:
    """Bytes of the state that will be paged and is not managed yet, of parameters with a first step ahead too."""
    item = 1 if optimizer.args.optim_bits == 8 else 4
    managed = _managed(optimizer)
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    total = 0
    for parameter in parameters:
        if parameter.numel() >= PAGED_FROM:
            state = optimizer.state.get(parameter, {})
            there = [key for key in KEYS if isinstance(state.get(key), Tensor) and state[key].data_ptr() in managed]
            total += (len(KEYS) - len(there)) * item * parameter.numel()
    return total


def repage(optimizer: Any) -> int:
    """Moves state that a resume turned into ordinary tensors to managed memory; returns how many tensors it moved.

    bitsandbytes' load_state_dict and Lightning's move to the device each make ordinary CUDA tensors of paged state.
    Which tensors are managed is the page manager's list, not the mark ``is_paged``, which a deep copy keeps. What they
    took on the device is given back to the driver, which pages are brought in by.
    """
    functional, manager = import_bitsandbytes().functional, optimizer.page_mng
    managed = _managed(optimizer)
    moved = 0
    for parameter, state in optimizer.state.items():
        for key in KEYS:
            old = state.get(key)
            if isinstance(old, Tensor) and old.numel() >= PAGED_FROM and old.data_ptr() not in managed:
                new = functional.get_paged(*old.shape, dtype=old.dtype, device=parameter.device)
                new.copy_(old.cpu())
                state[key] = new
                manager.paged_tensors.append(new)
                moved += 1
                del old
    if moved and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    return moved


def release(optimizer: Any) -> int:
    """Gives the managed memory of ``optimizer`` back to the driver and forgets the states that lay in it; returns its
    bytes. Nothing of an optimizer that has none. What is to be kept has to be copied before."""
    managed = _managed(optimizer)
    if not managed:
        return 0
    paged = {
        parameter: [
            state[key] for key in KEYS if isinstance(state.get(key), Tensor) and state[key].data_ptr() in managed
        ]
        for parameter, state in optimizer.state.items()
    }
    own = {tensor.data_ptr(): tensor.nbytes for tensors in paged.values() for tensor in tensors}
    for parameter, tensors in paged.items():
        if tensors:
            del optimizer.state[parameter]
    paged.clear()
    manager = optimizer.page_mng
    manager.paged_tensors[:] = [tensor for tensor in manager.paged_tensors if tensor.data_ptr() not in own]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()  # an update may be under way
    free: Callable[[Any], int] = driver().cuMemFree_v2
    refused = [pointer for pointer in own if free(ctypes.c_uint64(pointer))]
    if refused:
        log.warning("the driver did not take back %d of %d buffers of paged optimizer state", len(refused), len(own))
    return sum(size for pointer, size in own.items() if pointer not in refused)


def _managed(optimizer: Any) -> set[int]:
    """Addresses of the page manager's buffers, of all optimizers of this process."""
    manager = getattr(optimizer, "page_mng", None)
    return {tensor.data_ptr() for tensor in getattr(manager, "paged_tensors", ())}

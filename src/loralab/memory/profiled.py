"""The allocator's true peak on a CPU, where torch keeps no statistics: every allocation of one step, added up."""

import os
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.autograd.profiler import profile, record_function

MARK = "loralab/"
MEMORY = "[memory]"
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it says "profiler_start" on every use, above the level of its errors


class ProfiledStep:
    """From ``start`` to ``stop``: bytes alive at the highest moment of each phase that was ``begin``-ed.

    What was alive before is counted from the tensors themselves: the allocator reports no release of it. Only old
    gradients are released during a step, all of them before ``backward`` begins.
    """

    def __init__(self, module: nn.Module, optimizers: Iterable[Any], batch: Iterable[Tensor]) -> None:
        states = (state.values() for optimizer in optimizers for state in optimizer.state.values())
        held = chain(module.parameters(), module.buffers(), batch, *states)
        self.held = storage_bytes(value for value in held if isinstance(value, Tensor))
        self.gradients = storage_bytes(p.grad for p in module.parameters() if p.grad is not None)
        self._profile: Any = profile(profile_memory=True)

    def start(self) -> None:
        self._profile.__enter__()

    def begin(self, phase: str) -> None:
        """The allocations from here on belong to ``phase``."""
        with record_function(MARK + phase):
            pass

    def stop(self) -> dict[str, int]:
        """{phase: peak in bytes}."""
        self._profile.__exit__(None, None, None)
        return peaks(events(self._profile), self.held + self.gradients, self.gradients)


def events(profiled: Any) -> list[tuple[str, int, int]]:
    """(name of a mark, 0, 0) and ("", address, +-bytes) in the order they happened."""
    found, nodes = [], list(profiled.kineto_results.experimental_event_tree())
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if node.name == MEMORY:
            found.append((node.start_time_ns, "", int(node.extra_fields.ptr), int(node.extra_fields.alloc_size)))
        elif node.name.startswith(MARK):
            found.append((node.start_time_ns, node.name.removeprefix(MARK), 0, 0))
    return [event[1:] for event in sorted(found)]


def peaks(happened: Iterable[tuple[str, int, int]], level: int, gradients: int) -> dict[str, int]:
    """{phase: highest level}, from ``level`` bytes on, of which ``gradients`` go before the first backward.

    The release of an address that was not allocated here is passed over: the profiler remembers addresses from one
    use to the next, and what it says of their sizes is out of date.
    """
    found: dict[str, int] = {}
    alive: dict[int, int] = {}
    phase = ""
    for mark, address, size in happened:
        if mark:
            phase = mark
            level -= gradients if phase == "backward" and phase not in found else 0
        elif size > 0:
            alive[address] = size
            level += size
        else:
            level -= alive.pop(address, 0)
        found[phase] = max(level, found.get(phase, 0))
    found.pop("", None)
    return found


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes behind ``tensors``, memory that several of them share counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def batch_tensors(batch: Any) -> Iterator[Tensor]:
    """The tensors inside nested dicts and lists."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, dict | list | tuple):
        for value in batch.values() if isinstance(batch, dict) else batch:
            yield from batch_tensors(value)

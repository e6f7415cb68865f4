"""The allocator's true peak on a CPU, where torch keeps no statistics: all allocations of one step added up."""

import os
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.autograd.profiler import profile, record_function

MARK = "loralab/"
MEMORY = "[memory]"
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it logs "profiler_start" at every use, at a level above its errors


class ProfiledStep:
    """The peak of allocated bytes in each phase of one step, of which ``begin`` marks the beginning.

    Tensors from before ``start`` are counted by their storages: the profiler reports no release of them. Of these only
    the old gradients are released during a step, all before ``backward`` begins.
    """

    def __init__(self, module: nn.Module, optimizers: Iterable[Any], batch: Iterable[Tensor]) -> None:
        states = (state.values() for optimizer in optimizers for state in optimizer.state.values())
        values = chain(module.parameters(), module.buffers(), batch, *states)
        self.resident = storage_bytes(value for value in values if isinstance(value, Tensor))  # without gradients
        self.gradients = storage_bytes(p.grad for p in module.parameters() if p.grad is not None)
        self._profile: Any = profile(profile_memory=True)

    def start(self) -> None:
        self._profile.__enter__()

    def begin(self, phase: str) -> None:
        """The allocations from here on belong to ``phase``."""
        with record_function(MARK + phase):
            pass

    def stop(self) -> dict[str, int]:
        """Ends the profile and returns {phase: peak in bytes}."""
        self._profile.__exit__(None, None, None)
        return peaks(events(self._profile), self.resident + self.gradients, self.gradients)


def events(profiled: Any) -> list[tuple[str, int, int]]:
    """A profile's events in order of time: (phase, 0, 0) where a phase begins, ("", address, bytes) of an allocation,
    ("", address, -bytes) of a release."""
    timed, nodes = [], list(profiled.kineto_results.experimental_event_tree())
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if node.name == MEMORY:
            timed.append((node.start_time_ns, "", int(node.extra_fields.ptr), int(node.extra_fields.alloc_size)))
        elif node.name.startswith(MARK):
            timed.append((node.start_time_ns, node.name.removeprefix(MARK), 0, 0))
    return [event[1:] for event in sorted(timed)]


def peaks(profiled: Iterable[tuple[str, int, int]], level: int, gradients: int) -> dict[str, int]:
    """{phase: peak in bytes} of the ``events`` of a profile. ``level``: bytes alive at its start, of which
    ``gradients`` are released before the first backward.

    The release of an address that was not allocated here is ignored: the profiler remembers addresses from one use to
    the next, with sizes that are out of date.
    """
    by_phase: dict[str, int] = {}
    alive: dict[int, int] = {}
    phase = ""
    for mark, address, size in profiled:
        if mark:
            phase = mark
            level -= gradients if phase == "backward" and phase not in by_phase else 0
        elif size > 0:
            alive[address] = size
            level += size
        else:
            level -= alive.pop(address, 0)
        by_phase[phase] = max(level, by_phase.get(phase, 0))
    by_phase.pop("", None)
    return by_phase


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of ``tensors``; one that several of them share counts once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def batch_tensors(batch: Any) -> Iterator[Tensor]:
    """The tensors inside nested dicts, lists and tuples."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, dict | list | tuple):
        for value in batch.values() if isinstance(batch, dict) else batch:
            yield from batch_tensors(value)

"""Bytes in use by the counts of torch's allocator, the driver and the host, and time on each device.

bitsandbytes' paged state is in none of torch's numbers: it is managed memory, which the driver counts while its pages
are on the card, and the host while they are not.
"""

import logging
import os
import re
import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

GIB = 2**30
PROC = ("/proc/self/statm", "/proc/meminfo")


@dataclass(frozen=True)
class Reading:
    """One phase's memory in bytes; None where the device has no such count."""

    peak: int  # CUDA: the allocator's peak; CPU: the resident set at the phase's end
    reserved: int | None = None  # peak of what torch's caching allocator reserved
    used: int | None = None  # on the card by all processes, as the driver counts


class Host:
    """A CPU: torch keeps no allocator statistics there, so a phase has its resident set."""

    device = "cpu"
    instrument = "resident set size"
    retries = 0

    def __init__(self) -> None:
        # open for the whole run: a path look-up at every step would cost time
        files = [os.open(p, os.O_RDONLY | os.O_CLOEXEC) if Path(p).is_file() else None for p in PROC]
        self._statm, self._meminfo = files
        for file in files:
            if file is not None:
                weakref.finalize(self, os.close, file)
        self._page = os.sysconf("SC_PAGE_SIZE")

    def read(self, driver: bool = True) -> Reading:
        """The memory of the phase since the last call; on CUDA resets the allocator's peak. ``driver``: its count is
        asked for too, which takes longer than all others."""
        return Reading(self.resident())

    def resident(self) -> int:
        """Resident set size of this process in bytes (Linux; elsewhere its peak so far)."""
        if self._statm is not None:
            return int(os.pread(self._statm, 64, 0).split()[1]) * self._page
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def available(self) -> int | None:
        """Bytes that the host can give without swapping; None without /proc/meminfo."""
        if self._meminfo is None:
            return None
        match = re.search(rb"MemAvailable:\s+(\d+) kB", os.pread(self._meminfo, 512, 0))
        return int(match[1]) * 1024 if match else None

    def rebase(self) -> None:
        """Takes what the driver counts beyond torch's own for context and kernels: called where all of these are
        loaded and no page of managed memory is on the card yet."""

    def give_back(self) -> None:
        """Gives the driver what torch holds and does not use, so that managed pages can come back to the card."""

    def managed_resident(self, managed: int) -> int | None:
        """An estimate of how many of the ``managed`` bytes are on the card; None where there is none."""
        return None

    def mark(self) -> Any:
        """A point in the device's time, for ``passed`` and ``seconds``."""
        return time.perf_counter()

    def passed(self, mark: Any) -> bool:
        """Whether the device has reached ``mark``; does not wait for it."""
        return True

    def seconds(self, start: Any, end: Any) -> float:
        """Seconds from one mark to another that the device has reached."""
        return float(end - start)

    def wait(self) -> None:
        """Blocks until the device has done all work submitted to it."""


class Cuda(Host):
    """A CUDA device: counts of allocator, driver and host. Only ``wait`` waits for the device."""

    device = "cuda"
    instrument = "torch allocator peak"

    def __init__(self) -> None:
        super().__init__()
        self._readable = True
        self._reserved = 0
        self._overhead: int | None = None
        self.rebase()
        self.others = other_processes()
        if self.others:
            log.warning(
                "%d other processes use this card: device_used and managed_resident count their memory too, and times "
                "are shared with them",
                self.others,
            )

    def rebase(self) -> None:
        used = self.used()
        self._overhead = None if used is None else used - torch.cuda.memory_reserved()

    def give_back(self) -> None:
        torch.cuda.empty_cache()

    def read(self, driver: bool = True) -> Reading:
        stats = torch.cuda.memory_stats_as_nested_dict()  # memory_stats() flattens and sorts hundreds of entries
        torch.cuda.reset_peak_memory_stats()
        self.retries = int(stats.get("num_alloc_retries", 0))
        allocated, reserved = (stats.get(f"{kind}_bytes", {}).get("all", {}) for kind in ("allocated", "reserved"))
        self._reserved = int(reserved.get("current", 0))
        return Reading(int(allocated.get("peak", 0)), int(reserved.get("peak", 0)), self.used() if driver else None)

    def used(self) -> int | None:
        """Bytes in use on the card by the driver's count; None, with one warning, where the driver gives none."""
        if self._readable:
            try:
                free, total = torch.cuda.mem_get_info()
                return total - free
            except RuntimeError as error:
                self._readable = False
                log.warning("the driver does not report how much of the card is used (%s); training goes on", error)
        return None

    def managed_resident(self, managed: int) -> int | None:
        used = self.used()
        if used is None or self._overhead is None:
            return None
        return min(max(used - self._reserved - self._overhead, 0), managed)

    def mark(self) -> Any:
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def passed(self, mark: Any) -> bool:
        return bool(mark.query())

    def seconds(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) / 1000

    def wait(self) -> None:
        torch.cuda.synchronize()


def other_processes() -> int | None:
    """How many other processes compute on this card; None, with a warning, where NVML cannot be read."""
    try:
        text = torch.cuda.list_gpu_processes()
    except Exception as error:  # NVML's own errors, or no library at all
        text = f"{type(error).__name__}: {error}"
    lines = re.findall(r"process\s+\d+ uses", text)
    if lines or "no processes" in text:
        return max(0, len(lines) - 1)  # less this process, whose id inside a container is another
    log.warning(
        "NVML cannot be read (%s): whether other processes use this card is not known", " ".join(text.split())[:120]
    )
    return None


def managed_bytes(optimizers: Iterable[Any]) -> int:
    """Bytes of optimizer state in managed memory: of the tensors with bitsandbytes' mark ``is_paged``."""
    states = (state for optimizer in optimizers for state in optimizer.state.values())
    values = (value for state in states for value in state.values())
    return sum(value.nbytes for value in values if isinstance(value, Tensor) and getattr(value, "is_paged", False))

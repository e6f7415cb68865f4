"""Peak memory by phase of a step, in Lightning's real order: forward, zero_grad, backward, optimizer.

On CUDA: the allocator's peak (bytes torch allocated). On a CPU: the process's resident set at the end of each
phase, so the same callback runs, and is tested, everywhere.
"""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

GIB = 2**30


class PhaseMemory(Callback):
    """Logs ``memory/{phase}_peak_gib`` every ``every_n_steps`` and keeps each phase's maximum for the record."""

    pack_aware = True

    def __init__(self, every_n_steps: int = 10) -> None:
        if not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.peaks: dict[str, int] = {}
        self._now: dict[str, int] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close("load")

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._close("forward")  # zero_grad runs between forward and backward

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._close("backward")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Tensor | Any, batch: Any, batch_idx: int
    ) -> None:
        self._close("optimizer")
        if trainer.global_step % self.every_n_steps == 0:
            pl_module.report({f"memory/{phase}_peak_gib": size / GIB for phase, size in self._now.items()})  # type: ignore[operator]
        self._now = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close("evaluation")

    def summary(self) -> dict[str, Any]:
        """The ``memory`` part of a record; the allocator's peak is null on a CPU, where torch keeps none."""
        cuda = torch.cuda.is_available()
        peak = max(self.peaks.values(), default=0)
        return {
            "device": "cuda" if cuda else "cpu",
            "measured_peak_bytes": peak if cuda and peak else None,
            "by_phase": dict(self.peaks),
            "instrument": "torch allocator peak" if cuda else "resident set size",
        }

    def _close(self, phase: str) -> None:
        size = _allocated() if torch.cuda.is_available() else resident_bytes()
        self._now[phase] = max(size, self._now.get(phase, 0))
        self.peaks[phase] = max(size, self.peaks.get(phase, 0))


def _allocated() -> int:
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def resident_bytes() -> int:
    """Resident set size of this process in bytes (Linux; elsewhere its peak so far)."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

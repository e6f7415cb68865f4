"""Less memory on purpose (ballast, cap), spikes on purpose (lengthened batches), and snapshots of the allocations."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from loralab.errors import ConfigError
from loralab.memory.ledgers import GIB, managed_bytes
from loralab.memory.phases import SPLIT, PhaseMemory
from loralab.memory.spikes import MIB, Spike
from loralab.spec import Count, Gib, NotNegative, Positive, spec

log = logging.getLogger(__name__)

WARM_UP = 2  # steps before a ballast: the first allocates the optimizer's managed state
SHORT_OF = 0.5  # share of the optimizer's state that ballast=auto leaves no room for
SPARE = 256 * MIB  # free memory that a ballast leaves
MAX_SNAPSHOTS = 3  # of spikes
MAX_EVENTS = 100_000  # allocations in the history of a snapshot


@spec("memory")
class MemorySpec:
    """Ballast, cap and snapshots need a CUDA device; lengthened batches need none."""

    ballast: Annotated[Literal["auto"] | Positive | None, "null, auto or a positive number of GiB"] = None
    cap: Gib | None = None
    snapshot: str | None = None
    spiky_every: Count | None = None  # null: no batch is lengthened
    spiky_length: Count | None = None
    solo: bool = False
    prefix_cache: Annotated[NotNegative, "a number of GiB, 0: nothing is kept"] = 1.0  # host memory for blocks' outputs

    @property
    def alone(self) -> str:
        """Why a trial with this spec cannot share a pass with other trials; empty where it can."""
        keys = [key for key in ("ballast", "cap", "snapshot", "spiky_every") if getattr(self, key) is not None]
        keys += ["solo"] if self.solo else []
        return f"memory.{keys[0]} is set, and a trial whose memory is limited or measured runs alone" if keys else ""

    @property
    def prefix_bytes(self) -> int:
        """Bytes of host memory for outputs of the blocks below the lowest adapted one; 0 where memory or time is
        measured."""
        return 0 if self.alone else int(self.prefix_cache * GIB)

    def check(self, device: str) -> None:
        """Raises ConfigError on a CPU where a key is set that needs a CUDA device."""
        for key in ("ballast", "cap", "snapshot"):
            if device == "cpu" and getattr(self, key) is not None:
                raise ConfigError(
                    f"memory.{key}={getattr(self, key)} needs a CUDA device, and this run is on the CPU; valid: null"
                )

    def callbacks(self) -> list[Callback]:
        """The Lightning callbacks of ``ballast`` and ``snapshot``, for those that are set."""
        ballasts = [] if self.ballast is None else [Ballast(self.ballast, self.spiky_every or 0)]
        return [*ballasts, *([] if self.snapshot is None else [Snapshots(Path(self.snapshot))])]

    @contextmanager
    def capped(self) -> Iterator[None]:
        """Within, torch's allocator may use ``cap`` GiB of the card, as if it were a smaller one; null: no limit."""
        if self.cap is None:
            yield
            return
        _, total = torch.cuda.mem_get_info()
        if self.cap * GIB >= total:
            log.warning("memory.cap=%g GiB is no less than the card's %.1f GiB: no effect", self.cap, total / GIB)
        torch.cuda.set_per_process_memory_fraction(min(1.0, self.cap * GIB / total))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    @property
    def continues(self) -> bool:
        """Whether a run may be resumed in its middle: not one whose ballast or spikes come at counted steps."""
        return self.ballast is None and self.spiky_every is None

    def record(self) -> dict[str, Any]:
        """The fields of a record beside the configuration: with a cap its bytes and the mark "simulated", else none."""
        return {} if self.cap is None else {"cap_bytes": int(self.cap * GIB), "simulated": True}

    def spike(self, max_length: int, positions: int | None) -> int:
        """Tokens of a lengthened row; ``positions``: the longest sequence of the base, None: no limit."""
        return self.spiky_length or min(4 * max_length, positions or 4 * max_length)

    def passes(self, passes: Any, max_length: int, positions: int | None) -> Any:
        """``passes`` with those of every ``spiky_every``-th step lengthened. Raises ConfigError where the base cannot
        take a longer batch, or ``spiky_length`` is none."""
        if self.spiky_every is None:
            return passes
        length = self.spike(max_length, positions)
        if length <= max_length or (positions and length > positions):
            raise ConfigError(
                f"memory.spiky_length={length} must be more than model.max_length={max_length}, and at most the "
                f"{positions or 'unlimited'} positions of the base: a spike is a batch longer than any row"
            )
        return Lengthened(passes, self.spiky_every, length)


class Lengthened:
    """Training passes, those of every ``every``-th step padded to ``length`` tokens.

    Padding is masked, so loss and gradients stay what they were, up to rounding, and arms with and without spikes
    train alike; memory is needed for padding as for real tokens.
    """

    def __init__(self, passes: Any, every: int, length: int) -> None:
        self.passes, self.every, self.length = passes, every, length

    def __len__(self) -> int:
        return len(self.passes)

    def __iter__(self) -> Iterator[dict[int, Any]]:
        for index, batches in enumerate(self.passes):
            long = (index // self.passes.micros + 1) % self.every == 0
            yield {i: self._lengthen(i, batch) if long else batch for i, batch in batches.items()}

    def _lengthen(self, index: int, batch: dict[str, Any]) -> dict[str, Any]:
        padding = {"input_ids": self.passes.trials[index].pad_token_id, "attention_mask": 0, "labels": -100}
        tensors: dict[str, Tensor] = batch["tensors"]
        shape = tensors["input_ids"].shape
        missing = max(0, self.length - shape[1])
        return {
            **batch,
            "tensors": {  # labels of another shape are not aligned with the tokens
                key: F.pad(value, (0, missing), value=padding[key]) if value.shape == shape else value
                for key, value in tensors.items()
            },
        }


class Ballast(Callback):
    """One allocation on the card, of at most what is free, from the end of the warm-up to the end of the fit.

    By then the optimizer's managed state has been allocated. ``auto`` leaves what the warm-up needed without that
    state, and half of the state: an unpaged optimizer then runs out of memory, and a paged one has to evict the other
    half. The size is the same for both.
    """

    pack_aware = False

    def __init__(self, size: float | str, spiky_every: int = 0) -> None:
        self.size, self.steps = size, max(WARM_UP, spiky_every)  # auto: a warm-up with a long batch
        self.bytes = 0
        self._block: Tensor | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._block is None and trainer.global_step == (self.steps if self.size == "auto" else WARM_UP):
            callbacks = trainer.callbacks  # type: ignore[attr-defined]
            observer = next((callback for callback in callbacks if isinstance(callback, PhaseMemory)), None)
            peaks = [observer.peaks.get(p, 0) for p in SPLIT] if observer else [torch.cuda.max_memory_allocated()]
            self._allocate(max(peaks), trainer.optimizers)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._block = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._block = None

    def summary(self) -> dict[str, Any]:
        return {"ballast_bytes": self.bytes}

    def _allocate(self, peak: int, optimizers: Iterable[Any]) -> None:
        """Allocates the ballast; ``peak``: bytes of torch's allocator in the warm-up. Warns where it is smaller than
        configured, or cannot be allocated."""
        torch.cuda.empty_cache()
        optimizers = list(optimizers)
        state, managed = state_bytes(optimizers), managed_bytes(optimizers)
        free, total = torch.cuda.mem_get_info()
        if self.size == "auto":
            overhead = total - free - torch.cuda.memory_reserved() - managed  # context, kernels, other processes
            wanted = auto_ballast(total - max(0, overhead), peak - (state - managed), state)
        else:
            wanted = int(float(self.size) * GIB)
        size = min(wanted, free - SPARE)
        if size < wanted:
            log.warning(
                "memory.ballast: %.2f GiB are configured and %.2f GiB are free; %.2f GiB are allocated",
                *(wanted / GIB, free / GIB, max(0, size) / GIB),
            )
        try:
            self._block = torch.empty(max(0, size), dtype=torch.uint8, device="cuda")
            self.bytes = max(0, size)
        except torch.OutOfMemoryError as error:
            self._block = torch.empty(0)
            log.warning("memory.ballast could not be allocated (%s); training goes on", " ".join(str(error).split()))


def auto_ballast(room: int, need: int, state: int) -> int:
    """Bytes to take from ``room`` bytes, so that ``need`` and all but SHORT_OF of the optimizer's ``state`` fit."""
    return max(0, room - need - int((1 - SHORT_OF) * state))


def state_bytes(optimizers: Iterable[Any]) -> int:
    """Bytes of all optimizer state, managed or not, on any device."""
    states = (state for optimizer in optimizers for state in optimizer.state.values())
    return sum(v.nbytes for state in states for v in state.values() if isinstance(v, Tensor))


class Snapshots(Callback):
    """Writes torch's memory snapshots (for pytorch.org/memory_viz) of the first spikes and of out of memory."""

    pack_aware = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: list[str] = []
        self._recording = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            log.warning("memory.snapshot=%s cannot be written (%s); no snapshot is taken", self.folder, error.strerror)
            return
        torch.cuda.memory._record_memory_history(max_entries=MAX_EVENTS, stacks="python")
        self._recording = True
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PhaseMemory):
                callback.on_spike.append(self.spike)

    def spike(self, spike: Spike) -> None:
        """Writes a snapshot with the allocations before ``spike``, of the first MAX_SNAPSHOTS."""
        if len(self.paths) < MAX_SNAPSHOTS:
            self._dump(f"step{spike.step}_{spike.phase}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, torch.OutOfMemoryError):
            self._dump(f"step{trainer.global_step + 1}_out_of_memory")
        self._stop()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def summary(self) -> dict[str, Any]:
        return {"snapshots": list(self.paths)}

    def _dump(self, name: str) -> None:
        if not self._recording:
            return
        path = self.folder / f"{name}.pickle"
        try:
            torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
            self.paths.append(str(path))
        except (OSError, RuntimeError) as error:
            log.warning("memory.snapshot: %s was not written (%s); training goes on", path, error)

    def _stop(self) -> None:
        if self._recording:
            torch.cuda.memory._record_memory_history(enabled=None)
        self._recording = False

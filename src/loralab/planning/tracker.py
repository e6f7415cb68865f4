"""Counts live storages, operator by operator, while a step runs with fake tensors: nothing is really allocated.

A weak reference tells when a storage ends. The kind of each is decided afterwards, when it is known which of them
outlived the forward pass.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = ("base", "constants", "adapter", "gradients", "optimizer", "activations", "logits", "transient")
aten = torch.ops.aten
DEVICE = torch.ops.prim.device.default


@dataclass
class Block:
    """One storage."""

    size: int
    kind: str
    graph: bool  # made while a graph was recorded
    born: int  # index of its event
    died: int | None = None


@dataclass
class Segment:
    """A stretch of the run and the most that was alive in it, split by kind."""

    phase: str
    place: str
    peak: int = -1
    kinds: dict[str, int] = field(default_factory=dict)


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Entered above a FakeTensorMode. ``rounding``: bytes a block is a multiple of (CUDA's allocator: 512).

    Fake tensors have no values, so two values are set here. A boolean scalar is ``nothing_masked``, the only one that
    transformers reads. A boolean mask with n elements selects ``targets[n]`` of them, all where that is not set; the
    loss selects the positions that are targets.
    """

    def __init__(self, rounding: int, nothing_masked: bool, vocabulary: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rounding, self.nothing_masked, self.vocabulary = rounding, nothing_masked, vocabulary
        self.targets: dict[int, int] = {}
        self.marks: list[tuple[int, str, str]] = []
        self._events: list[tuple[Block, int]] = []  # +1: born, -1: died
        self._live: dict[int, tuple[Block, Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # nothing is compiled here, and each call would cost a wrapper's
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE and isinstance(args[0], FakeTensor):  # as fake tensors answer it, and more than half of all
            return args[0].fake_device
        if func is aten._local_scalar_dense.default:
            return self.nothing_masked if args[0].dtype == torch.bool else 1
        if func is aten.index.Tensor and any(t is not None and t.dtype == torch.bool for t in args[1]):
            args = (args[0], self._positions(args[1]))
        if func is aten.nonzero.default:
            return self._nonzero(args[0])
        if func in (aten.index_put.default, aten._unsafe_index_put.default) and args[3:] == (True,):
            func = aten.index_put_.default  # of real tensors, the backward of an index adds into its zeros in place
        out = func(*args, **(kwargs or {}))
        for leaf in out if isinstance(out, (list, tuple)) else (out,):
            for tensor in (leaf,) if isinstance(leaf, Tensor) else tree_leaves(leaf):
                if isinstance(tensor, Tensor):
                    self._note(tensor)
        return out

    def mark(self, phase: str, place: str = "") -> None:
        """From here on everything belongs to ``phase`` and the ``place`` in it; phase "" is not reported."""
        self.marks.append((len(self._events), phase, place))

    def tag(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Sets the kind of the tensors' storages, and counts those that no operator has made."""
        for tensor in tensors:
            self._note(tensor).kind = kind

    def leave_out(self, tensors: Iterable[Tensor]) -> int:
        """Counts the storages of these tensors as 0 bytes; returns the bytes they had."""
        total = 0
        for tensor in tensors:
            block = self._note(tensor)
            total, block.size = total + block.size, 0
        return total

    def _note(self, tensor: Tensor) -> Block:
        storage = tensor.untyped_storage()
        known = self._live.get(storage._cdata)
        if known is not None:
            return known[0]
        size = -(-storage.nbytes() // self.rounding) * self.rounding
        logits = tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary
        block = Block(size, "logits" if logits else "", torch.is_grad_enabled(), len(self._events))
        self._live[storage._cdata] = block, weakref.ref(storage, partial(self._end, storage._cdata))
        self._events.append((block, 1))
        return block

    def _end(self, key: int, _: Any) -> None:
        block, _ = self._live.pop(key)
        block.died = len(self._events)
        self._events.append((block, -1))

    def segments(self) -> list[Segment]:
        """The peak of each stretch between two marks, in order."""
        alive, total = dict.fromkeys(KINDS, 0), 0
        segments = []
        for number, (start, phase, place) in enumerate(self.marks):
            later = [(tick, name) for tick, name, _ in self.marks[number + 1 :]]
            stop = later[0][0] if later else len(self._events)
            over = next((tick for tick, name in later if name != phase), len(self._events))
            segment = Segment(phase, place, total, dict(alive))
            for block, sign in self._events[start:stop]:
                block.kind = block.kind or _kind(block, phase, over)
                alive[block.kind] += sign * block.size
                total += sign * block.size
                if total > segment.peak:
                    segment.peak, segment.kinds = total, dict(alive)
            segments.append(segment)
        return segments

    def levels(self) -> NDArray[np.int64]:
        """Bytes alive after every event of a reported phase, in order."""
        signed = [sign * block.size for block, sign in self._events]
        alive = np.concatenate([[0], np.cumsum(np.array(signed, np.int64))])
        ends = [start for start, _, _ in self.marks[1:]] + [len(signed)]
        parts = [alive[start : end + 1] for (start, phase, _), end in zip(self.marks, ends, strict=True) if phase]
        return np.concatenate(parts) if parts else alive[:0]

    def forget(self) -> None:
        """Drops all events and weak references."""
        self._live.clear()
        self._events.clear()

    def _nonzero(self, mask: Any) -> Tensor:
        count = max(1, self.targets.get(mask.numel(), mask.numel()))
        nonzero = torch.empty(count, mask.dim(), dtype=torch.int64, device=mask.device)
        self._note(nonzero)
        return nonzero

    def _positions(self, indices: Any) -> list[Any]:
        """``indices`` with each boolean mask as its nonzero positions, (n, dim) int64, as kernels make them."""
        positions: list[Any] = []
        for index in indices:
            if index is None or index.dtype != torch.bool:
                positions.append(index)
                continue
            positions += self._nonzero(index).unbind(1)
        return positions


def _kind(block: Block, phase: str, over: int) -> str:
    """Activations outlive their forward pass, or are made for the graph when a checkpoint is recomputed."""
    outlives = block.died is None or block.died > over
    if phase == "load":
        return "constants" if block.died is None else "transient"
    activation = block.graph if phase == "backward" else outlives and phase == "forward"
    return "activations" if activation else "transient"

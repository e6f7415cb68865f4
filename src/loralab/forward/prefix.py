"""The frozen prefix: blocks below the lowest adapted one, computed once for each row, whichever trials feed it.

The stacked batch enters the model as ever, so embeddings, masks and positions are everybody's. Within the prefix the
blocks see only the distinct rows that are not known yet; after its last block every trial's rows are put in place.
What a row gave is kept for later epochs, validations and packs. It is taken again only where recomputing it would give
the same bits: of a batch without padding always, else under the same padded length and the same kind of mask.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapters.base import Adapter
from loralab.adapters.blocks import stack
from loralab.errors import is_out_of_memory
from loralab.forward.compiled import eager
from loralab.forward.dropout import base_dropout
from loralab.forward.unpadded import LENGTHS, mask_of
from loralab.numerics.stacks import received, sent
from loralab.quantization.sequences import watched

log = logging.getLogger(__name__)

Key = tuple[Any, ...]  # depth, padded length, whether unpadded, autocast's dtype, split's identity, row
HOST = {"cpu"}  # where states are kept as they are computed; those of a card come while it goes on
CLOSE = 0.05  # relative error of a row by which the first pass tells rounding (bf16, other GEMM shapes) from a mix-up


class States:
    """Hidden states entering a block, (tokens, width) a row, in host memory; the first to come stay.

    Nothing is evicted: epochs come round, and the rows thrown out would be the next to be needed.
    """

    def __init__(self) -> None:
        self.budget = self.bytes = 0
        self._kept: dict[Key, Tensor] = {}
        self._coming: list[tuple[Callable[[], Mapping[Key, Tensor]], int]] = []  # states on their way, and their limit
        self._sources: list[object] = []  # held, so that no other data gets their identity

    def open(self, sources: Iterable[object], budget: int) -> None:
        """For trials on these data; states of other data are dropped."""
        distinct = list({id(source): source for source in sources}.values())
        if budget < self.bytes or list(map(id, distinct)) != list(map(id, self._sources)):
            self._kept, self._coming, self.bytes = {}, [], 0
        self._sources, self.budget = distinct, budget

    def find(self, keys: Iterable[Key]) -> dict[Key, Tensor]:
        for states, limit in self._coming:
            self.put(states(), limit)
        self._coming = []
        return {key: self._kept[key] for key in keys if key in self._kept}

    def put(self, states: Mapping[Key, Tensor], limit: int) -> None:
        """Keeps copies, unless they exceeded ``limit`` bytes with what is kept."""
        for key, own in states.items():
            if key not in self._kept and self.bytes + own.nbytes <= limit:
                self._kept[key] = own.clone()
                self.bytes += own.nbytes

    def put_later(self, states: Callable[[], Mapping[Key, Tensor]], limit: int) -> None:
        """The same of what ``states`` gives, which is asked for when any are looked for next."""
        self._coming.append((states, limit))


@dataclass
class Pass:
    """Which rows of a stacked batch the prefix computes, and where their states belong."""

    depth: int
    keys: list[Key]  # of the stacked rows
    lengths: list[int]  # their tokens, padding not counted
    flat: bool  # one row (1, tokens, ...) without padding
    known: dict[Key, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.first: dict[Key, int] = {}
        for place, key in enumerate(self.keys):
            self.first.setdefault(key, place)
        self.missing = [key for key in self.first if key not in self.known]
        self._fed = [self.first[key] for key in self.missing]
        order = {key: place for place, key in enumerate([*self.known, *self.missing])}
        self._places = [order[key] for key in self.keys]
        self._sent: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def rows(self, states: Tensor, places: Sequence[int] | None = None) -> list[Tensor]:
        """(tokens, width) of each row, without padding; ``places``: which rows ``states`` holds, null: all."""
        lengths = self.lengths if places is None else [self.lengths[place] for place in places]
        if self.flat:
            return list(torch.split(states[0], lengths))
        return [own[:length] for own, length in zip(states, lengths, strict=True)]

    def computed(self, states: Tensor) -> dict[Key, Tensor]:
        """Of states that a narrowed call gave: each row's."""
        return dict(zip(self.missing, self.rows(states, self._fed), strict=True))

    def narrow(self, value: Any) -> Any:
        """An argument of a block, of the missing rows only."""
        if isinstance(value, tuple):
            return tuple(map(self.narrow, value))
        if self.flat:
            return self._narrow_flat(value)
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == len(self.keys):
            return self._select(value, self._fed)
        return value

    def _narrow_flat(self, value: Any) -> Any:
        if hasattr(value, LENGTHS):
            return mask_of([self.lengths[place] for place in self._fed])
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[:2] == (1, sum(self.lengths)):
            rows = torch.split(value, self.lengths, 1)
            return torch.cat([rows[place] for place in self._fed], 1)
        return value

    def widen(self, computed: Tensor | None, like: Tensor) -> Tensor:
        """States of all rows, from those computed now and those known; ``like``: hidden states of this pass."""
        if self.flat:
            known = {key: states.to(like.device, non_blocking=True) for key, states in self.known.items()}
            own = known | ({} if computed is None else self.computed(computed))
            return torch.cat([own[key] for key in self.keys])[None]
        parts = [] if computed is None else [computed]
        if self.known:
            some = next(iter(self.known.values()))
            host = some.new_zeros(len(self.known), like.shape[1], some.shape[1])
            for place, states in enumerate(self.known.values()):
                host[place, : len(states)] = states
            parts.insert(0, sent(host, like.device))
        return self._select(torch.cat(parts) if len(parts) > 1 else parts[0], self._places)

    def _select(self, value: Tensor, rows: list[int]) -> Tensor:
        """``rows`` of value; their numbers go to the device once a pass, for all arguments of all blocks."""
        if rows == list(range(len(rows))):
            return value[: len(rows)]
        key = tuple(rows), value.device
        if key not in self._sent:
            self._sent[key] = sent(torch.tensor(rows), value.device)
        return value.index_select(0, self._sent[key])


class Prefix:
    """What the trials on one base have in common below the lowest layer that any of them adapts."""

    def __init__(
        self,
        model: nn.Module,
        adapters: Sequence[Adapter],
        sources: Iterable[object] = (),
        budget: int = 0,
        states: States | None = None,
    ) -> None:
        """``states``: of the packs before on this model; None: there are none. ``budget``: bytes it may hold."""
        self.model = model
        self.states = states or States()
        self.states.open(sources, budget)
        layers = stack(model)
        self.blocks = [] if layers is None or len(set(layers)) < len(layers) else list(layers)
        within = next((f"{name}." for name, module in model.named_modules() if module is layers), "")
        self.depths = [_depth(adapter, within, len(self.blocks)) for adapter in adapters]
        names = {name for adapter in adapters for name in adapter.module_names if any(self.depths)}
        self._outside = [model.get_submodule(name) for name in names if not name.startswith(within)]
        self._dropout = base_dropout(model) > 0
        self._narrowable: dict[tuple[int, bool, bool], bool] = {}

    @contextmanager
    def shared(self, inputs: Mapping[str, Any], batches: Mapping[int, Mapping[str, Any]]) -> Iterator[None]:
        """Within, a call of the model with ``inputs``, the stacked ``batches``, computes no row twice."""
        shared_pass = self._pass(inputs, batches)
        if shared_pass is None or not self._can_be_narrowed(inputs, shared_pass):
            yield
            return
        with self._narrowed(shared_pass, keep=True):
            yield

    def _pass(self, inputs: Mapping[str, Any], batches: Mapping[int, Mapping[str, Any]]) -> Pass | None:
        """None where every row is computed once anyway, or not twice alike. The planner's batches have no rows: its
        figure for a pack with a prefix is an upper bound."""
        depth = min(self.depths[index] for index in batches)
        known_rows = all("chosen" in batch for batch in batches.values())
        if not depth or not known_rows or (self._dropout and self.model.training) or watched(self.model):
            return None
        rows = [row for batch in batches.values() for row in batch["chosen"]]
        if not self.states.budget and len(set(rows)) == len(rows):
            return None
        masks = [batch["tensors"]["attention_mask"] for batch in batches.values()]
        lengths = [length for mask in masks for length in mask.sum(1).tolist()]
        ids = inputs["input_ids"]
        flat = hasattr(inputs["attention_mask"], LENGTHS)
        kind = ids.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        padding = (0, True) if flat else (ids.shape[1], min(lengths) == ids.shape[1])
        keys = [(depth, *padding, dtype, *row) for row in rows]
        return Pass(depth, keys, lengths, flat, self.states.find(keys))

    @contextmanager
    def _narrowed(self, shared_pass: Pass, keep: bool) -> Iterator[None]:
        """Replaces what the blocks of the prefix compute; hooks on them go on as ever."""
        blocks = self.blocks[: shared_pass.depth]
        for block in blocks:
            block.forward = partial(self._forward, shared_pass, block is blocks[-1], keep, block.forward)
        try:
            with eager(blocks):
                yield
        finally:
            for block in blocks:
                del block.forward

    def _forward(self, shared_pass: Pass, last: bool, keep: bool, forward: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        computed = None
        with torch.no_grad():
            if shared_pass.missing:
                computed = forward(
                    *map(shared_pass.narrow, args), **{key: shared_pass.narrow(value) for key, value in kwargs.items()}
                )
            if not last:
                return hidden if computed is None else computed
            if keep and computed is not None:
                self._keep(shared_pass, computed)
            return shared_pass.widen(computed, hidden)

    def _keep(self, shared_pass: Pass, computed: Tensor) -> None:
        # training rows come in ever new paddings: they shall not take the room of a validation, which repeats itself
        limit = self.states.budget // 2 if self.model.training else self.states.budget
        if self.states.bytes < limit:
            if computed.device.type in HOST:  # what comes behind may change it in place
                self.states.put(shared_pass.computed(computed), limit)
            else:
                host = received(computed)
                self.states.put_later(lambda: shared_pass.computed(host()), limit)

    def _can_be_narrowed(self, inputs: Mapping[str, Any], shared_pass: Pass) -> bool:
        """Compares, at the first pass of a kind, with the plain one: no list of models says which may do this."""
        # where rows could pass for tokens
        kind = (shared_pass.depth, shared_pass.flat, len(shared_pass.keys) == inputs["input_ids"].shape[1])
        if kind not in self._narrowable:
            with eager(self.blocks):
                why = self._why_not_narrowed(inputs, shared_pass)
            self._narrowable[kind] = not why
            log.info(
                "the frozen blocks below block %d of %d are computed %s",
                *(
                    shared_pass.depth,
                    len(self.blocks),
                    f"for each trial, since {why}" if why else "once for equal rows",
                ),
            )
        return self._narrowable[kind]

    def _why_not_narrowed(self, inputs: Mapping[str, Any], shared_pass: Pass) -> str:
        """Why this model's prefix cannot be narrowed; empty where it can. Half of the rows are handed on as known."""
        try:
            plain = shared_pass.rows(self._leaving(shared_pass.depth, inputs))
            rows = {key: plain[place].cpu() for key, place in shared_pass.first.items()}
            known = {key: rows[key] for key in list(rows)[1::2]}
            with self._narrowed(
                Pass(shared_pass.depth, shared_pass.keys, shared_pass.lengths, shared_pass.flat, known), keep=False
            ):
                narrowed = shared_pass.rows(self._leaving(shared_pass.depth, inputs))
            errors = [float((a - b).norm() / b.norm()) for a, b in zip(narrowed, plain, strict=True)]
            return "" if max(errors) <= CLOSE else "its blocks do not treat rows one by one"
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            if is_out_of_memory(error):  # says nothing of the blocks, and fewer trials may cure it
                raise
            return f"its blocks are of another kind ({' '.join(str(error).split())[:100]})"

    def _leaving(self, depth: int, inputs: Mapping[str, Any]) -> Tensor:
        """Hidden states after the prefix; the model runs no further."""
        handles = [module.register_forward_pre_hook(_too_early) for module in self._outside]
        handles.append(self.blocks[depth - 1].register_forward_hook(_stop))
        try:
            with torch.no_grad():
                self.model(**inputs)
        except _Reached as reached:
            if not isinstance(reached.hidden, Tensor):
                raise TypeError(f"a block returns {type(reached.hidden).__name__}") from None
            return reached.hidden
        finally:
            for handle in handles:
                handle.remove()
        raise RuntimeError("the last block of the prefix is not run")


class _Reached(Exception):  # noqa: N818 - it carries a result
    def __init__(self, hidden: Any) -> None:
        super().__init__()
        self.hidden = hidden


def _stop(module: nn.Module, args: Any, hidden: Any) -> None:
    raise _Reached(hidden)


def _too_early(module: nn.Module, args: Any) -> None:
    raise RuntimeError(f"an adapted {type(module).__name__} comes before them")


def _depth(adapter: Adapter, within: str, count: int) -> int:
    """The lowest block that ``adapter`` changes; 0 where that is not known."""
    if not adapter.spec.layerwise:
        return 0
    inside = [name.removeprefix(within) for name in adapter.module_names if name.startswith(within)]
    return min((int(name.partition(".")[0]) for name in inside), default=count) if count else 0

"""Where a trial's rows meet its own parameters: one forward hook a layer, shared by every trial on the base.

A batch that passes through the base is a stack of the trials' batches along dim 0. ``AdapterHooks.rows`` says whose
rows are where; each hooked layer hands every trial its own slice of input and output and puts the slices together
again. One trial alone is the same code with one slice.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, cast
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loralab.adapters.dropout import Share
from loralab.adapters.masks import MaskKey
from loralab.errors import LoralabError
from loralab.numerics.shadows import Shadowed


class NotPackable(LoralabError):  # noqa: N818 - it says what a model is, not what went wrong
    """The base folds the batch dimension, so rows of several trials cannot be told apart."""


@dataclass(frozen=True)
class BatchSlice:
    """One trial's part of the stacked batch."""

    owner: nn.Module  # the trial's adapter
    rows: int
    key: int | None = None  # dropout key of this pass; None while evaluating
    tokens: int | None = None  # of all its rows, where the batch is flat
    share: Share | None = None  # None: no other process has rows of the batch

    def mixed(self, *words: int) -> MaskKey | None:
        """The key of one mask: other ``words``, another mask; None while evaluating."""
        if self.key is None:
            return None
        units = None if self.share is None else self.share.units(self.rows, self.tokens)
        return MaskKey(self.key, words, units)


class AdapterHooks:
    """The hooks on one base model and the slices of the batch under way.

    ``new_parameters``: names of the base's parameters that no checkpoint held. ``tokenizer``: the base's; may be None.
    ``originals``: (model, names of quantized layers) -> their weights (out, in) before quantization, one by one; None
    where they are not to be had. ``layer_inputs``: of the trial that is attached (``training/layer_inputs.py``); None
    where it has no rows. ``decomposed``: what a start was computed from, for the next trial of the pack.
    ``restoring``: whether the adapter that is attached takes up what lies in files, so that its start does not matter.
    """

    def __init__(self) -> None:
        self.new_parameters: frozenset[str] = frozenset()
        self.tokenizer: Any = None
        self.originals: Callable[[nn.Module, list[str]], Iterator[Tensor]] | None = None
        self.layer_inputs: Any = None
        self.decomposed: dict[tuple[Any, str], Any] = {}
        self.restoring = False
        self._stands = False  # the slices are those of every pass
        self._slices: tuple[BatchSlice, ...] = ()
        self._drawn = 0  # masks of the pass under way
        self._calls: dict[int, int] = {}  # {salt of a layer: its calls in the pass under way}
        self._hooks: dict[tuple[str, type[Hook]], Hook] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "AdapterHooks":
        """Itself, as a trial's copy of a layer stays on the base; a copy where one adapter acts on every pass, with
        which a copy of the model would otherwise be the bare base."""
        if not self._stands:
            return self
        memo[id(self)] = copied = AdapterHooks()
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    @classmethod
    def of(cls, model: nn.Module) -> "AdapterHooks":
        """The one ``AdapterHooks`` of ``model``, made at first use; a ``models.loading.Base`` has it as ``hooks``.

        It is an attribute of the model, since a table of models would keep each of them alive: adapters refer to them.
        """
        if "loralab_hooks" not in model.__dict__:
            model.__dict__["loralab_hooks"] = cls()
        return cast(AdapterHooks, model.__dict__["loralab_hooks"])

    @property
    def slices(self) -> tuple[BatchSlice, ...]:
        """Whose rows the pass under way holds, in their order."""
        return self._slices

    def begin_pass(self, slices: tuple[BatchSlice, ...]) -> None:
        """A new pass, whose rows belong to ``slices`` in their order; empty: to the bare base."""
        Shadowed.begin_pass()
        self._slices, self._drawn, self._calls = slices, 0, {}

    def stand(self, owner: nn.Module) -> None:
        """From now on every row of every pass is ``owner``'s, however many there are, in evaluation. No other is
        attached any more; without what would serve that, the model can be pickled."""
        self._stands, self.originals, self.layer_inputs = True, None, None
        self.begin_pass((BatchSlice(owner, 1),))

    def keys(self) -> list[MaskKey]:
        """The key of each slice for the next mask that the base itself draws in this pass; none while evaluating."""
        self._drawn += 1
        keys = [part.mixed(self._drawn) for part in self._slices]
        return [key for key in keys if key is not None]

    def replayed(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """``context_fn`` of a checkpointed block: computed again, it draws its masks again."""
        return nullcontext(), _Replay(self, self._drawn, self._calls)

    def call(self, salt: int) -> int:
        """How often a layer was called before in the pass under way: ALBERT's are, once a repetition."""
        before = self._calls.get(salt, 0)
        self._calls[salt] = before + 1
        return before

    @contextmanager
    def given(self, **values: Any) -> Iterator[None]:
        """Within, the attributes of these names have other values."""
        before = {name: getattr(self, name) for name in values}
        vars(self).update(values)
        try:
            yield
        finally:
            vars(self).update(before)

    @contextmanager
    def only(self, part: BatchSlice) -> Iterator[None]:
        """Within, a part of the pass that holds the rows of ``part`` alone, and masks of its own."""
        before = self._slices, self._drawn, self._calls
        self._slices, self._drawn, self._calls = (part,), 0, {}
        try:
            yield
        finally:
            self._slices, self._drawn, self._calls = before

    @contextmanager
    def batch(self, *slices: BatchSlice) -> Iterator[None]:
        """Within, the batch belongs to ``slices`` in this order; afterwards to nobody (the bare base)."""
        self.begin_pass(slices)
        try:
            yield
        finally:
            self.begin_pass(())

    @property
    def flat(self) -> bool:
        """Whether the batch under way is one row of all trials' tokens, without padding."""
        return all(part.tokens is not None for part in self.slices)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Slices of ``x`` (rows of all slices, ...), one each; rows may be multiplied (beams, flat tokens).
        Of a flat batch (1, tokens, ...) along its tokens."""
        return (x,) if len(self.slices) == 1 else torch.split(x, self._sizes(x), int(self.flat))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """What ``split`` took apart."""
        return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), int(self.flat))

    def spans(self, x: Tensor) -> list[tuple[int, int]]:
        """Where each slice begins and ends in ``x`` with its leading dimensions flattened."""
        count = x.numel() // x.shape[-1]
        if len(self.slices) == 1:
            return [(0, count)]
        sizes = self._sizes(x)
        ends = list(accumulate(size * count // sum(sizes) for size in sizes))
        return list(zip([0, *ends], ends, strict=False))

    def _sizes(self, x: Tensor) -> list[int]:
        if self.flat and x.shape[0] == 1:
            sizes = [part.tokens or 0 for part in self.slices]
            if x.dim() > 1 and x.shape[1] == sum(sizes):
                return sizes
        total = sum(part.rows for part in self.slices)
        factor, rest = divmod(x.shape[0], total)
        if rest or not factor or self.flat:
            raise NotPackable(f"a layer sees {tuple(x.shape)} where {total} stacked rows were fed")
        return [part.rows * factor for part in self.slices]

    def attach(self, model: nn.Module, name: str, owner: nn.Module, delta: nn.Module, before: bool = False) -> None:
        """From now on ``delta(x, y, key) -> y`` acts on ``owner``'s rows at layer ``name``, or whatever else the class
        of ``delta`` has as its ``hook``; ``before``: on what enters the layer, which is x and y."""
        kind: type[Hook] = _InputHook if before else getattr(delta, "hook", _LayerHook)
        place = name, kind
        if place not in self._hooks:
            self._hooks[place] = kind(self, model.get_submodule(name), crc32(f"{name}{kind.suffix}".encode()))
        self._hooks[place].deltas.setdefault(owner, []).append(delta)

    def layers_of(self, owner: nn.Module) -> list[str]:
        """Names of the layers that ``owner`` changes."""
        return self._layers(lambda hook: owner in hook.deltas)

    def never_called(self, owner: nn.Module) -> list[str]:
        """Names of ``owner``'s layers whose hooks have seen none of its rows so far."""
        return self._layers(lambda hook: owner in hook.deltas and owner not in hook.called)

    def _layers(self, chosen: Callable[["Hook"], bool]) -> list[str]:
        return list(dict.fromkeys(name for (name, _), hook in self._hooks.items() if chosen(hook)))

    def detach(self, owner: nn.Module) -> None:
        """Takes every delta of ``owner`` off; a layer nobody adapts loses its hook."""
        for place, hook in list(self._hooks.items()):
            hook.deltas.pop(owner, None)
            hook.called.discard(owner)
            if not hook.deltas:
                for handle in hook.handles:
                    handle.remove()
                del self._hooks[place]


class _Replay(AbstractContextManager[None]):
    """Within, masks are numbered from ``drawn`` on; may be entered again."""

    def __init__(self, hooks: AdapterHooks, drawn: int, calls: dict[int, int]) -> None:
        self.hooks, self.drawn, self.calls = hooks, drawn, dict(calls)

    def __enter__(self) -> None:
        self.after = self.hooks._drawn, self.hooks._calls
        self.hooks._drawn, self.hooks._calls = self.drawn, dict(self.calls)

    def __exit__(self, *_: object) -> None:
        self.hooks._drawn, self.hooks._calls = self.after


class Hook:
    """What the adapters do at one module of the base."""

    suffix = ""  # of the layer's name, where dropout keys are to differ from another hook's on it

    def __init__(self, hooks: AdapterHooks, layer: nn.Module, salt: int) -> None:
        self.hooks, self.salt = hooks, salt
        self.deltas: dict[nn.Module, list[nn.Module]] = {}
        self.called: set[nn.Module] = set()  # owners with rows in a pass that came here
        self.handles: list[RemovableHandle] = []


class _LayerHook(Hook):
    """Forward hook of one frozen layer."""

    def __init__(self, hooks: AdapterHooks, layer: nn.Module, salt: int) -> None:
        super().__init__(hooks, layer, salt)
        self.before = 0  # calls of the layer in this pass before the one under way
        self.handles.append(self.register(layer))

    def register(self, layer: nn.Module) -> RemovableHandle:
        return layer.register_forward_hook(self, with_kwargs=True)

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any], y: Tensor) -> Any:
        return self.changed(args[0] if args else named[_first(named)], y)

    def changed(self, x: Tensor, y: Tensor) -> Tensor:
        """y with what every trial's deltas do to its rows."""
        slices = self.hooks.slices
        owners = [part.owner for part in slices if part.owner in self.deltas]
        if not owners:
            return y
        if not torch.compiler.is_compiling():  # a compiled block has been called before, and once in each pass
            self.called.update(owners)
            self.before = self.hooks.call(self.salt)
        found = [self.deltas.get(part.owner, []) for part in slices]
        kinds = {type(delta) for own in found for delta in own}
        # a class that inherits ``forward_grouped`` may compute something else
        if len(kinds) == 1 and all(len(own) < 2 for own in found) and "forward_grouped" in vars(kind := kinds.pop()):
            return self._together(kind, x, y)
        parts = [
            self._own(part, a, b) for part, a, b in zip(slices, self.hooks.split(x), self.hooks.split(y), strict=True)
        ]
        return self.hooks.join(parts)

    def _together(self, kind: Any, x: Tensor, y: Tensor) -> Tensor:
        """Deltas of a kind that can act on its rows of the whole stack, which saves taking it apart."""
        given = [
            (*span, delta, self._key(part))
            for part, span in zip(self.hooks.slices, self.hooks.spans(x), strict=True)
            for delta in self.deltas.get(part.owner, ())
        ]
        changed: Tensor = kind.forward_grouped(x, y, given)
        return changed

    def _own(self, part: BatchSlice, x: Tensor, y: Tensor) -> Tensor:
        key = self._key(part)
        with self.hooks.only(replace(part, key=key)):  # a head trained whole may hold dropout
            for delta in self.deltas.get(part.owner, ()):
                y = delta(x, y, key).to(y.dtype)  # the next layer computes in the base's
        return y

    def _key(self, part: BatchSlice) -> int | None:
        """Of its masks here: others at each call of a layer that a pass calls again."""
        again = (self.before,) if self.before else ()
        return part.mixed(self.salt, *again)


class _InputHook(_LayerHook):
    """Hook on what enters a frozen layer."""

    suffix = "<"

    def register(self, layer: nn.Module) -> RemovableHandle:
        return layer.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any], y: Any = None) -> Any:
        if args:
            return (self.changed(args[0], args[0]), *args[1:]), named
        key = _first(named)
        return args, {**named, key: self.changed(named[key], named[key])}


def _first(named: dict[str, Any]) -> str:
    """Of arguments given by name: the first tensor's."""
    return next(key for key, value in named.items() if isinstance(value, Tensor))


def bare_copy(module: nn.Module) -> nn.Module:
    """A copy without the hooks of adapters, which would copy the adapters and their base with it."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for given in (part._forward_hooks, part._forward_pre_hooks):
            memo[id(given)] = OrderedDict((number, hook) for number, hook in given.items() if not _of_adapters(hook))
    return copy.deepcopy(module, memo)


def _of_adapters(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", hook), Hook)


def acts(layer: nn.Module, owners: Collection[nn.Module]) -> bool:
    """Whether a hook changes what ``layer`` gives to the rows of ``owners``; of a hook of another kind nobody knows."""
    return any(
        not isinstance(hook, _LayerHook) or not hook.deltas.keys().isdisjoint(owners)
        for hook in layer._forward_hooks.values()
    )

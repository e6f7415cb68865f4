"""Where a trial's rows meet its own parameters: one forward hook a layer, shared by every trial on the base.

A batch that passes through the base is a stack of the trials' batches along dim 0. ``Sites.rows`` says whose
rows are where; each hooked layer hands every trial its own slice of input and output and puts the slices together
again. One trial alone is the same code with one slice.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast
from zlib import crc32

import torch
from torch import Tensor, nn

from loralab.errors import LoralabError


class NotPackable(LoralabError):  # noqa: N818 - it says what a model is, not what went wrong
    """The base folds the batch dimension, so rows of several trials cannot be told apart."""


@dataclass(frozen=True)
class Share:
    """One trial's part of the stacked batch."""

    owner: nn.Module  # the trial's adapter
    rows: int
    key: int | None = None  # dropout key of this pass; None while evaluating
    tokens: int | None = None  # of all its rows, where the batch is flat


class Sites:
    """The hooks on one base model and the shares of the batch under way."""

    def __init__(self) -> None:
        self.shares: tuple[Share, ...] = ()
        self._sites: dict[str, _Site] = {}

    @classmethod
    def of(cls, model: nn.Module) -> "Sites":
        """The one ``Sites`` of ``model``, made at first use."""
        if "loralab_sites" not in model.__dict__:
            model.__dict__["loralab_sites"] = cls()
        return cast(Sites, model.__dict__["loralab_sites"])

    @contextmanager
    def batch(self, *shares: Share) -> Iterator[None]:
        """Within, the batch belongs to ``shares`` in this order; afterwards to nobody (the bare base)."""
        self.shares = shares
        try:
            yield
        finally:
            self.shares = ()

    @property
    def flat(self) -> bool:
        """Whether the batch under way is one row of all trials' tokens, without padding."""
        return all(share.tokens is not None for share in self.shares)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Slices of ``x`` (rows of all shares, ...), one a share; rows may be multiplied (beams, flat tokens).
        Of a flat batch (1, tokens, ...) along its tokens."""
        return (x,) if len(self.shares) == 1 else torch.split(x, self._sizes(x), int(self.flat))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """What ``split`` took apart."""
        return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), int(self.flat))

    def spans(self, x: Tensor) -> list[tuple[int, int]]:
        """Where each share begins and ends in ``x`` with its leading dimensions flattened."""
        count = x.numel() // x.shape[-1]
        if len(self.shares) == 1:
            return [(0, count)]
        sizes = self._sizes(x)
        ends = list(accumulate(size * count // sum(sizes) for size in sizes))
        return list(zip([0, *ends], ends, strict=False))

    def _sizes(self, x: Tensor) -> list[int]:
        if self.flat and x.shape[0] == 1:
            sizes = [share.tokens or 0 for share in self.shares]
            if x.dim() > 1 and x.shape[1] == sum(sizes):
                return sizes
        total = sum(share.rows for share in self.shares)
        factor, rest = divmod(x.shape[0], total)
        if rest or not factor or self.flat:
            raise NotPackable(f"a layer sees {tuple(x.shape)} where {total} stacked rows were fed")
        return [share.rows * factor for share in self.shares]

    def hold(self, model: nn.Module, name: str, owner: nn.Module, delta: nn.Module) -> None:
        """From now on ``delta(x, y, key) -> y`` acts on ``owner``'s rows at layer ``name``."""
        if name not in self._sites:
            self._sites[name] = _Site(self, model.get_submodule(name), crc32(name.encode()))
        self._sites[name].deltas.setdefault(owner, []).append(delta)

    def release(self, owner: nn.Module) -> None:
        """Takes every delta of ``owner`` off; a layer nobody adapts loses its hook."""
        for name, site in list(self._sites.items()):
            site.deltas.pop(owner, None)
            if not site.deltas:
                site.handle.remove()
                del self._sites[name]


class _Site:
    """Forward hook of one frozen layer."""

    def __init__(self, sites: Sites, layer: nn.Module, salt: int) -> None:
        self.sites, self.salt = sites, salt
        self.deltas: dict[nn.Module, list[nn.Module]] = {}
        self.handle = layer.register_forward_hook(self)

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        shares = self.sites.shares
        if not any(share.owner in self.deltas for share in shares):
            return y
        found = [self.deltas.get(share.owner, []) for share in shares]
        kinds = {type(delta) for own in found for delta in own}
        if len(kinds) == 1 and all(len(own) < 2 for own in found) and hasattr(kind := kinds.pop(), "together"):
            return self._together(kind, args[0], y)
        parts = [
            self._own(share, a, b)
            for share, a, b in zip(shares, self.sites.split(args[0]), self.sites.split(y), strict=True)
        ]
        return self.sites.join(parts)

    def _together(self, kind: Any, x: Tensor, y: Tensor) -> Tensor:
        """Deltas of a kind that can act on its rows of the whole stack, which saves taking it apart."""
        given = [
            (*span, delta, self._key(share))
            for share, span in zip(self.sites.shares, self.sites.spans(x), strict=True)
            for delta in self.deltas.get(share.owner, ())
        ]
        changed: Tensor = kind.together(x, y, given)
        return changed

    def _own(self, share: Share, x: Tensor, y: Tensor) -> Tensor:
        for delta in self.deltas.get(share.owner, ()):
            y = delta(x, y, self._key(share))
        return y

    def _key(self, share: Share) -> int | None:
        return None if share.key is None else mix(share.key, self.salt)


def mix(*words: int) -> int:
    """A 63-bit key from several words (splitmix64's finalizer), equal on every platform."""
    state = 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def keyed_dropout(x: Tensor, p: float, key: int | None) -> Tensor:
    """Inverted dropout whose mask depends on ``key`` alone, so a recomputed or packed forward draws the same."""
    if key is None or p == 0.0:
        return x
    generator = torch.Generator(device=x.device).manual_seed(key)
    keep = torch.empty_like(x).bernoulli_(1.0 - p, generator=generator)
    return x * keep.div_(1.0 - p)

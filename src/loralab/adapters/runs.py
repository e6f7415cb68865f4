"""LoRA's update of a pass whose trials are many, in a number of operations that does not grow with theirs.

It is ``fused``'s, with the parts of one rank that follow each other in one product each (``products``), their A and
their B stacked. The stack is a view where the parts' parameters lie side by side (``optim/packed.py``). Dropout is one
mask, drawn once a pass and kept for the gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loralab.adapters.masks import kept, scale_of
from loralab.adapters.products import OF_A, OF_B, Matrices, OneByOne, as_dtype, form_for, products_dtype
from loralab.numerics.stacks import side_by_side
from loralab.quantization.linear import without_autocast


@dataclass(frozen=True)
class Part:
    """One trial's positions (``start`` to ``stop`` of the leading dimensions flattened) and what its update needs."""

    start: int
    stop: int
    scaling: float
    dropout: float
    key: int | None
    length: int = 1  # positions of a row, padding counted

    @property
    def rate(self) -> float:
        """The share of its inputs that is dropped in this pass."""
        return 0.0 if self.key is None else self.dropout


@dataclass(frozen=True)
class Run:
    """Parts of one rank that follow each other: those from number ``first`` on."""

    first: int
    parts: tuple[Part, ...]
    rank: int
    form: OneByOne

    @property
    def place(self) -> slice:
        """Its positions."""
        return slice(self.parts[0].start, self.parts[-1].stop)

    @property
    def scalings(self) -> tuple[float, ...]:
        """Of each part, with what dropout multiplies what it keeps by."""
        return tuple(part.scaling * scale_of(part.rate) for part in self.parts)

    @property
    def drops(self) -> bool:
        return any(part.rate for part in self.parts)

    def of(self, factors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The A and the B of its parts, of those of all parts in turn."""
        own = factors[2 * self.first : 2 * (self.first + len(self.parts))]
        return own[::2], own[1::2]

    def joined(self, factors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Matrices, Matrices]:
        """The same in ``dtype``, as its form takes them."""
        a, b = self.of(factors)
        return self.form.joined(a, dtype, OF_A), self.form.joined(b, dtype, OF_B)

    def kept(self, own: Tensor) -> Tensor:
        """Which of ``own`` (its positions, width) dropout keeps, bool."""
        keys, rates = [part.key for part in self.parts], [part.rate for part in self.parts]
        return kept(self.form.sizes, keys, rates, self.parts[0].length, own)


def runs_of(parts: Sequence[Part], factors: Sequence[Tensor], dtype: torch.dtype) -> list[Run]:
    """The parts, those together whose products can be made together. Trials are in few runs where those of a pass are
    in the order of their ranks."""
    ranks = [len(a) for a in factors[::2]]
    begins = [
        number
        for number, part in enumerate(parts)
        if not number or ranks[number] != ranks[number - 1] or part.start != parts[number - 1].stop
    ]
    runs = []
    for first, end in zip(begins, [*begins[1:], len(parts)], strict=True):
        own = tuple(parts[first:end])
        sizes = tuple(part.stop - part.start for part in own)
        form = form_for(sizes, factors[2 * first], factors[2 * first + 1], dtype)
        runs.append(Run(first, own, ranks[first], form))
    return runs


class Together(torch.autograd.Function):
    """``fused``'s function by runs. Where the factors have gradients side by side, those of an earlier pass of the same
    step, it adds to them itself, in one operation: autograd would add one after the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, parts: tuple[Part, ...], *factors: Tensor) -> Tensor:
        ctx.dtype = products_dtype(x, factors)
        ctx.runs = runs_of(parts, factors, ctx.dtype)
        rows, out = _flat(x), y.view(-1, y.shape[-1])
        with without_autocast(x.device.type):
            masks = [run.kept(rows[run.place]) if run.drops else None for run in ctx.runs]
            inner = [
                _forward(run, rows[run.place], mask, out[run.place], factors, ctx.dtype)
                for run, mask in zip(ctx.runs, masks, strict=True)
            ]
        ctx.save_for_backward(x, *factors, *inner, *masks)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        count, number = len(saved) - 2 * len(ctx.runs), len(ctx.runs)
        factors, inner, masks = saved[:count], saved[count:-number], saved[-number:]
        rows, back = _flat(x), _flat(dy)
        dx = _like(rows, ctx.runs) if ctx.needs_input_grad[0] else None
        trained = any(ctx.needs_input_grad[3:])  # PiSSA's A0 and B0 are not
        found: list[Tensor | None] = [] if trained else [None] * count
        with without_autocast(x.device.type):
            for run, h, mask in zip(ctx.runs, inner, masks, strict=True):
                form, (a, b) = run.form, run.joined(factors, ctx.dtype)
                own = as_dtype(back[run.place], ctx.dtype)
                dh = form.times(own, b)
                form.scale(dh, run.scalings)
                if trained:
                    given = _kept(rows[run.place], mask, ctx.dtype)
                    made = (form.outer(dh, given), form.outer(own, h))
                    found += _gradients(run, factors, made)
                if dx is not None:
                    _into(dx[run.place], run, mask, dh, a)
        return None if dx is None else dx.view(x.shape), dy, None, *found


def _forward(
    run: Run, own: Tensor, mask: Tensor | None, out: Tensor, factors: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    """Adds the run's update to ``out``; scaling * drop(own) A^T, (positions, r)."""
    form, (a, b) = run.form, run.joined(factors, dtype)
    h = form.times(_kept(own, mask, dtype), form.turned(a))
    form.scale(h, run.scalings)
    if out.dtype == h.dtype:
        form.add(out, h, form.turned(b))
    else:
        out.add_(form.times(h, form.turned(b)).to(out.dtype))
    return h


def _kept(own: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``own`` in ``dtype`` without what dropout drops. What it multiplies the rest by is in the run's scalings."""
    return as_dtype(own if mask is None else own * mask, dtype)


def _into(dx: Tensor, run: Run, mask: Tensor | None, dh: Tensor, a: Matrices) -> None:
    """The run's gradient of x, written where it belongs."""
    if mask is not None:
        torch.mul(run.form.times(dh, a), mask, out=dx)
    elif dx.dtype == dh.dtype:
        run.form.times(dh, a, dx)
    else:
        dx.copy_(run.form.times(dh, a))


def _gradients(run: Run, factors: Sequence[Tensor], made: tuple[Matrices, Matrices]) -> list[Tensor | None]:
    """The gradients of A and B of each part in turn; None for those that have been added where they belong."""
    kinds: list[Sequence[Tensor | None]] = []
    for rank, own, matrices in zip((OF_A, OF_B), run.of(factors), made, strict=True):
        new = run.form.cut(matrices, own[0].dtype, rank, run.rank)
        # a compiled graph hands its gradients to autograd
        before = [None if torch.compiler.is_compiling() else factor.grad for factor in own]
        present = [gradient for gradient in before if gradient is not None]
        if not isinstance(new, Tensor):
            kinds.append(new)
        elif len(present) < len(own) or (there := side_by_side(present)) is None:
            kinds.append(new.unbind(0))
        else:
            there.add_(new)
            kinds.append([None] * len(own))
    return list(chain.from_iterable(zip(*kinds, strict=True)))


def _flat(x: Tensor) -> Tensor:
    """(positions, width), row after row, as grouped products need it."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _like(rows: Tensor, runs: Sequence[Run]) -> Tensor:
    """For the gradient of x, (positions, in); zero where they belong to nobody."""
    whole = sum(run.place.stop - run.place.start for run in runs) == len(rows)
    return torch.empty_like(rows) if whole else torch.zeros_like(rows)

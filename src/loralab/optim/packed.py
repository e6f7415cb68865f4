"""AdamW of all trials of a pack at once: a row of one buffer each, stepped in as many operations as one trial.

Trials whose parameters have the same shapes share a buffer (trials, elements), of which their parameters become views;
so do their moments. What the factors of a layer need stacked is then a view (``adapters/runs.py``), in half precision
of one cast of the whole buffer a pass. Every trial keeps its learning rate, weight decay, betas and eps: they are
columns. The arithmetic is torch's, in another order of rounding, so that a CPU, where nothing is gained, steps trial by
trial.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loralab.numerics.shadows import Shadowed
from loralab.numerics.stacks import sent, stacked
from loralab.optim.groups import trial_of

DEVICES = {"cuda"}
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # AdamW's state of a parameter


def suits(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether ``PackedAdamW`` serves these groups: several trials, of one group each, in float32 on a card."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    alone = len(set(trial_of(groups))) == len(groups) > 1 and all(group["params"] for group in groups)
    return alone and all(p.dtype == torch.float32 and p.device.type in DEVICES for p in parameters)


def clip(optimizer: torch.optim.Optimizer, bounds: Mapping[int, float]) -> tuple[list[int], Tensor] | None:
    """(numbers of the trials with gradients, the norm of each before) of gradients that are clipped each to its trial's
    bound; None, and nothing is changed, where the optimizer is none of this module or has to step trial by trial."""
    if not isinstance(optimizer, PackedAdamW) or not optimizer.gather():
        return None
    found = [bucket.clip(bounds) for bucket in optimizer.buckets]
    return [trial for trials, _ in found for trial in trials], torch.cat([norms for _, norms in found])


class PackedAdamW(torch.optim.AdamW):
    """Its state is AdamW's, a step and two moments of each parameter. It steps as AdamW does, trial by trial, for good
    once a parameter has no gradient where others of its trial have one."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups)
        by_shapes: dict[tuple[torch.Size, ...], list[int]] = {}
        for number, group in enumerate(self.param_groups):
            by_shapes.setdefault(tuple(p.shape for p in group["params"]), []).append(number)
        trials = trial_of(self.param_groups)
        self.buckets = [
            Bucket(numbers, [trials[n] for n in numbers], [self.param_groups[n]["params"] for n in numbers])
            for numbers in by_shapes.values()
        ]
        self._apart = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:  # here, because clipping is part of Lightning's closure
            with torch.enable_grad():
                loss = closure()
        if self.gather():
            with torch.no_grad():
                for bucket in self.buckets:
                    bucket.update(self.param_groups, self.state)
        else:
            super().step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for bucket in self.buckets:  # of a step that was not made
            bucket.gradients = None

    @torch.no_grad()
    def gather(self) -> bool:
        """Copies the gradients of all trials into rows, unless they are there since the last step; False where it steps
        trial by trial."""
        if not self._apart and any(bucket.incomplete() or bucket.uneven(self.state) for bucket in self.buckets):
            self._apart = True
            for state in self.state.values():  # of a row all parameters have the same tensor
                state["step"] = state["step"].clone()
        if not self._apart:
            for bucket in self.buckets:
                bucket.gather()
        return not self._apart


class Bucket:
    """Trials whose parameters have the same shapes. ``numbers``: of their groups; ``trials``: of theirs in the pack;
    ``rows``: the parameters of each, which become views of ``values`` (trials, elements)."""

    def __init__(self, numbers: list[int], trials: list[int], rows: list[list[nn.Parameter]]) -> None:
        self.numbers, self.trials, self.rows = numbers, trials, rows
        self.sizes = [parameter.numel() for parameter in rows[0]]
        self.values = rows[0][0].new_empty(len(rows), sum(self.sizes), requires_grad=False)
        for row, own in zip(rows, self.values, strict=True):
            for parameter, part in zip(row, own.split_with_sizes(self.sizes), strict=True):
                parameter.data = part.view(parameter.shape).copy_(parameter.detach())
        self._shadowed = Shadowed(self.values, [parameter for row in rows for parameter in row])  # for the products
        self.gradients: Tensor | None = None  # between clipping and the update

    def incomplete(self) -> bool:
        """Whether some parameters of a trial have a gradient and some have none."""
        return any(len({p.grad is None for p in row}) > 1 for row in self.rows)

    def uneven(self, state: Mapping[Any, Any]) -> bool:
        """Whether parameters of a trial have made different numbers of steps, as a state may say that was read."""
        if self._kept(state) is not None:
            return False
        return any(len({float(state[p]["step"]) if p in state else 0.0 for p in row}) > 1 for row in self.rows)

    def gather(self) -> None:
        """Copies the gradients to ``gradients``, those of a trial that has none as zeros."""
        if self.gradients is not None or not any(self._active):
            return
        self._shadowed.forget()
        if all(self._active):
            sites = [stacked([p.grad for p in site if p.grad is not None]) for site in zip(*self.rows, strict=True)]
            self.gradients = torch.cat([site.reshape(len(self.rows), -1) for site in sites], 1)
            return
        self.gradients = torch.zeros_like(self.values)
        for row, own in zip(self.rows, self.gradients, strict=True):
            if given := [p.grad.reshape(-1) for p in row if p.grad is not None]:
                torch.cat(given, out=own)

    @torch.no_grad()
    def clip(self, bounds: Mapping[int, float]) -> tuple[list[int], Tensor]:
        """(trials with gradients, their norms before) of ``gradients``, each clipped to the bound of its trial as
        torch's clip_grad_norm_ does."""
        active = [k for k, has in enumerate(self._active) if has]
        if self.gradients is None:
            return [], self.values.new_empty(0)
        norms = torch.linalg.vector_norm(self.gradients, dim=1)
        limits = sent(torch.tensor([bounds[trial] for trial in self.trials], dtype=norms.dtype), norms.device)
        self.gradients.mul_(limits.div(norms + 1e-6).clamp(max=1.0)[:, None])
        own = norms if len(active) == len(self.rows) else norms[sent(torch.tensor(active), norms.device)]
        return [self.trials[k] for k in active], own

    def update(self, groups: Sequence[Mapping[str, Any]], state: dict[Any, Any]) -> None:
        """One step of the trials with a gradient, in their values and ``state``; the others stay as they are."""
        active, gradients, self.gradients = self._active, self.gradients, None
        if gradients is None or not any(active):
            return
        means, squares, steps = self._moments_of(state)
        steps += torch.tensor(active, dtype=steps.dtype)
        settings = [groups[number] for number in self.numbers]
        columns = [_columns(*given) for given in zip(settings, steps.tolist(), active, strict=True)]
        moved = sent(torch.tensor(columns, dtype=gradients.dtype).t().contiguous(), gradients.device)
        decay, share, kept, added, scale, eps, size, idle = moved[:, :, None].unbind(0)
        if not all(active):  # what is not finite must not meet a zero
            gradients.masked_fill_(idle.bool(), 0.0)
        self.values.mul_(decay)
        means.lerp_(gradients, share)
        squares.mul_(kept).add_(gradients.mul_(gradients).mul_(added))
        torch.sqrt(squares, out=gradients)
        torch.div(means, gradients.mul_(scale).add_(eps), out=gradients)
        self.values.sub_(gradients.mul_(size))

    @property
    def _active(self) -> list[bool]:
        return [row[0].grad is not None for row in self.rows]

    def _kept(self, state: Mapping[Any, Any]) -> tuple[Tensor, ...] | None:
        """The moments of all rows, of which ``state`` holds views; None where it holds none, or what a checkpoint or a
        move to the host put in their place. Nothing else holds them, so that such a move frees them."""
        own = [state[row[0]] for row in self.rows if row[0] in state]
        if len(own) < len(self.rows):
            return None
        bases = tuple(own[0][key]._base for key in MOMENTS)
        if any(base is None or len(base) != len(own) for base in bases) or bases[0].device != self.values.device:
            return None
        same = all(one[key]._base is base for one in own for key, base in zip(MOMENTS, bases, strict=True))
        return bases if same else None

    def _moments_of(self, state: dict[Any, Any]) -> tuple[Tensor, ...]:
        """(means, mean squares, steps on the host) of all rows, which take up what ``state`` holds and become what it
        holds."""
        if (kept := self._kept(state)) is not None:
            return kept
        means, squares = torch.zeros_like(self.values), torch.zeros_like(self.values)
        steps = torch.zeros(len(self.rows))
        for number, row in enumerate(self.rows):
            parts = zip(row, *(rows[number].split_with_sizes(self.sizes) for rows in (means, squares)), strict=True)
            for parameter, mean, square in parts:
                own = {"exp_avg": mean.view(parameter.shape), "exp_avg_sq": square.view(parameter.shape)}
                own["step"] = steps[number]
                for key, value in state.get(parameter, {}).items():
                    own[key].copy_(value)
                state[parameter] = own
        return means, squares, steps


def _columns(group: Mapping[str, Any], step: float, active: bool) -> tuple[float, ...]:
    """What a step of one trial multiplies by and adds (AdamW, arXiv:1711.05101, algorithm 2): the decay of the values,
    1 - beta1, beta2, 1 - beta2, 1 / sqrt(1 - beta2^t), eps, lr / (1 - beta1^t); whether it rests: then all stays."""
    if not active:
        return 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0
    lr, (beta1, beta2) = group["lr"], group["betas"]
    scale, size = 1 / math.sqrt(1 - beta2**step), lr / (1 - beta1**step)
    return 1 - lr * group["weight_decay"], 1 - beta1, beta2, 1 - beta2, scale, group["eps"], size, 0.0

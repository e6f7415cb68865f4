"""What the processes that train one trial together tell each other; alone, every function gives what it was given.

Each process holds the whole adapter and its optimizer, and computes its share of the rows of every pass. Losses and
gradients are sums over the target tokens of the whole step, so adding up the processes' is all there is to do.
"""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from loralab.errors import ArtifactError

Value = TypeVar("Value")


def rank_and_size() -> tuple[int, int]:
    """(the number of this process from 0 on, how many there are); (0, 1) alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def several() -> bool:
    """Whether more than one process trains the trial."""
    return rank_and_size()[1] > 1


def total(value: Tensor) -> Tensor:
    """The sum of the processes' values, the same bits in each of them."""
    if not several():
        return value
    summed = value.clone()
    dist.all_reduce(summed)
    return summed


def gathered(value: Value) -> list[Value]:
    """What each process gave, in the order of their numbers; tensors in it lie on the host."""
    size = rank_and_size()[1]
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value)
    return values


def first(value: Value) -> Value:
    """What the first process gave."""
    if not several():
        return value
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sets every gradient to the sum of the processes', by one reduction of one buffer; one that no process has stays
    None."""
    if not several():
        return
    own = list(parameters)
    sizes = [parameter.numel() for parameter in own]
    given = [parameter.grad is not None for parameter in own]
    device = own[0].device
    flags = torch.tensor(given, dtype=torch.float32, device=device)
    flat = [torch.zeros(p.numel(), device=device) if p.grad is None else p.grad.reshape(-1).float() for p in own]
    buffer = torch.cat([*flat, flags])
    dist.all_reduce(buffer)
    *sums, flags = torch.split(buffer, [*sizes, len(own)])
    for parameter, summed, has in zip(own, sums, flags.tolist(), strict=True):
        if not has:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.copy_(summed.view_as(parameter))


def agree(step: int, module: nn.Module) -> None:
    """Gives every process the parameters and buffers of the first one's ``module``. Raises ArtifactError where they do
    not stand at the same step, as with a checkpoint that another process cannot read."""
    if not several():
        return
    if len(set(steps := gathered(step))) > 1:
        raise ArtifactError(f"the processes of the run stand at steps {steps}: one of them cannot read the checkpoint")
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.data, 0)


Scores = tuple[Tensor, Tensor, Tensor]  # summed nll, predictions, targets


def joined(scores: Scores | None, device: torch.device) -> Scores | None:
    """The scores of all processes' rows of one batch, in the order of the rows; None where no process had a row."""
    mine = None if scores is None else tuple(part.detach().cpu() for part in scores)
    parts: Sequence[Any] = [one for one in gathered(mine) if one is not None]
    if not parts:
        return None
    losses, predictions, targets = zip(*parts, strict=True)
    return torch.stack(losses).sum().to(device), torch.cat(predictions).to(device), torch.cat(targets).to(device)

"""Lightning's strategy for one device, without its moves: what is on the card stays there between fits."""

from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import SingleDeviceStrategy

from loralab.training import together


class InPlace(SingleDeviceStrategy):
    """The module stays on its device; the optimizer's state goes to the host, and gradients are dropped.

    Lightning's own strategy moves the whole module, with the base, to the host after every fit and every validation:
    four times a run, within the seconds that are timed, and generation would run on the host.
    """

    def model_to_device(self) -> None:
        """Only for a module that is elsewhere: every ``.to`` drops the weights that layers keep unpacked."""
        assert self.model is not None
        if any(tensor.device != self.root_device for tensor in chain(self.model.parameters(), self.model.buffers())):
            super().model_to_device()

    def teardown(self) -> None:
        """Lightning's teardown without the move of the module."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        module, self._lightning_module = self._lightning_module, None  # Lightning moves this one
        try:
            super().teardown()
        finally:
            self._lightning_module = module


class Replicated(InPlace):
    """One of several processes with an adapter each, of which the first writes. Lightning's own DDP would wrap the
    frozen base too; here the module adds up the gradients (``FineTuner.on_after_backward``), and the strategy answers
    callbacks that ask the other processes."""

    strategy_name = "replicated"

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.global_rank, self.world_size = together.rank_and_size()
        self.local_rank = self.global_rank  # the processes of a run are on one machine

    @property
    def is_global_zero(self) -> bool:
        return self.global_rank == 0

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean", **_: Any) -> Any:
        """The mean of the processes' values, or with ``reduce_op`` "sum" their sum."""
        if not isinstance(tensor, torch.Tensor):
            return tensor
        summed = together.total(tensor.to(self.root_device))
        return summed if str(reduce_op).lower().endswith("sum") else summed / self.world_size

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all processes, or any of them, say so."""
        said = together.gathered(bool(decision))
        return min(said) if all else max(said)

    def all_gather(self, tensor: torch.Tensor, group: Any = None, sync_grads: bool = False) -> torch.Tensor:
        """The processes' tensors, stacked."""
        return torch.stack([one.to(tensor.device) for one in together.gathered(tensor.detach().cpu())])

    def barrier(self, *_: Any, **__: Any) -> None:
        dist.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """What the first process gives."""
        return together.first(obj)


def leave_signals(trainer: Any) -> None:
    """Keeps Lightning from handlers of its own. By SIGTERM it ends a fit where a step's rows and checkpoint may not be
    written yet; and of several processes it tells the others within the handler, where another exchange may be under
    way, and waits for ever (pytorch-lightning#20806). Only the first process gets a signal."""
    trainer._signal_connector.register_signal_handlers = _nothing
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing


def _nothing() -> None:
    pass

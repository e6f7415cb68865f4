"""Lightning's strategy for one device, without its moves: what is on the card stays there between fits."""

from itertools import chain

from lightning.pytorch.strategies import SingleDeviceStrategy


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

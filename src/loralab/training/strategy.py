"""Lightning's strategy for one device, without its moves: what is on the card stays there between fits."""

from itertools import chain

from lightning.pytorch.strategies import SingleDeviceStrategy


class InPlace(SingleDeviceStrategy):
    """Lightning's own moves the whole module to the host after every fit and every validation. The base is part of it:
    it would cross the bus four times a run, within the seconds that are timed, and generation would run on the host.

    Here the module stays where it is. The optimizer's state goes to the host as before; gradients are dropped.
    """

    def model_to_device(self) -> None:
        """A module that is there already is left alone: every ``.to`` drops what its layers keep unpacked."""
        assert self.model is not None
        if any(tensor.device != self.root_device for tensor in chain(self.model.parameters(), self.model.buffers())):
            super().model_to_device()

    def teardown(self) -> None:
        """All of Lightning's, but for the move of the module."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        module, self._lightning_module = self._lightning_module, None  # which is what Lightning would move
        try:
            super().teardown()
        finally:
            self._lightning_module = module

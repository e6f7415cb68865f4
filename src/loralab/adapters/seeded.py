"""An adapter with fixed random parts, which are kept as the seed that they are drawn from."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from loralab.adapters.base import Adapter, AdapterSpec


class SeededAdapter(Adapter):
    """``seed`` is in the state in place of what is drawn from it: a state of another seed brings its own."""

    seed: Tensor

    def __init__(self, model: nn.Module, spec: AdapterSpec, seed: int) -> None:
        super().__init__(model, spec)
        self.register_buffer("seed", torch.tensor(seed, device="cpu"))
        self.register_load_state_dict_post_hook(lambda adapter, _: adapter.draw())  # type: ignore[attr-defined, no-untyped-call]

    @abstractmethod
    def draw(self) -> None:
        """Draws every fixed part from ``seed``; called once they are all there, and when a state is loaded."""

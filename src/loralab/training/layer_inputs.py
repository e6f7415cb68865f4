"""What enters the layers of the bare base on a trial's first training rows: how it varies, for EVA's start of A."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapters.hooks import AdapterHooks
from loralab.data.batches import collate, permutation
from loralab.data.examples import Example
from loralab.quantization.base import linear_shape
from loralab.quantization.sequences import decoder_input_ids
from loralab.training.generation import evaluating

ROWS = 64  # of the first epoch; an epoch may be shorter
ROOM = 2**30  # bytes of the matrices that are summed in one pass over the rows; further layers take further passes


class LayerInputs:
    """Covariances of the inputs of layers, over all tokens of the first rows in the order of ``seed``.

    ``key`` is equal for trials that are fed the same. A row is computed by itself, so that no padding counts.
    """

    def __init__(self, model: nn.Module, train: Sequence[Example], task: str, seed: int) -> None:
        self.model, self.train, self.task, self.seed = model, train, task, seed

    @property
    def key(self) -> tuple[int, int]:
        return self.seed, id(self.train)

    def covariances(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor, int]]:
        """(layer, covariance (in, in) in float64, tokens seen) of each of ``names``, in their order."""
        sizes = [8 * linear_shape(self.model.get_submodule(name))[1] ** 2 for name in names]
        start = 0
        while start < len(names):
            stop = start + 1
            while stop < len(names) and sum(sizes[start : stop + 1]) <= ROOM:
                stop += 1
            moments = {name: _Moments(self.model.get_submodule(name)) for name in names[start:stop]}
            self._pass(list(moments.values()))
            yield from ((name, own.covariance(), own.count) for name, own in moments.items())
            start = stop

    def _pass(self, moments: list["_Moments"]) -> None:
        handles = [own.layer.register_forward_pre_hook(own, with_kwargs=True) for own in moments]
        try:
            with evaluating(self.model), AdapterHooks.of(self.model).batch():
                for row in permutation(len(self.train), self.seed, 0)[:ROWS]:
                    self.model(**self._inputs(self.train[row]))
        finally:
            for handle in handles:
                handle.remove()

    def _inputs(self, example: Example) -> dict[str, Tensor]:
        device = next(self.model.parameters()).device
        batch = {key: value.to(device) for key, value in collate([example], self.task, 0).items()}
        labels = batch.pop("labels")
        if self.task == "seq2seq_lm":
            batch["decoder_input_ids"] = decoder_input_ids(self.model, labels)
        return batch


class _Moments:
    """Sums x and x x^T over the inputs x of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.count = layer, 0
        self.total: Any = 0.0
        self.square: Any = 0.0

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = args[0] if args else next(value for value in named.values() if isinstance(value, Tensor))
        flat = x.detach().reshape(-1, x.shape[-1]).double()
        self.count += len(flat)
        self.total = self.total + flat.sum(0)
        self.square = self.square + flat.t() @ flat

    def covariance(self) -> Tensor:
        """Around the mean; empty for a layer that was not called."""
        if not self.count:
            return torch.empty(0, 0)
        mean = self.total / self.count
        covariance: Tensor = self.square / self.count - torch.outer(mean, mean)
        return covariance

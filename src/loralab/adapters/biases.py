"""A layer's own bias, trained: for BitFit, and for LoRA's ``bias``."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from loralab.adapters.grouped import Given, by_part


class BiasDelta(nn.Module):
    """Trains a layer's bias as the difference to the frozen one: y + db, db = 0 at first. Shape (out,)."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias_delta = nn.Parameter(torch.zeros_like(bias, dtype=torch.float32))

    def forward(self, x: Tensor, y: Tensor, key: int | None) -> Tensor:
        return y + self.bias_delta.to(y.dtype)

    def merged(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The bias with the difference added."""
        return {"bias": own["bias"] + self.bias_delta}

    @staticmethod
    def forward_grouped(x: Tensor, y: Tensor, slices: Sequence[Given]) -> Tensor:
        """The shifts of several trials, each (start, stop, delta, key) at its own positions."""
        return by_part(y, slices, lambda own, delta, key: delta(own, own, key))


class ChannelBiasDelta(BiasDelta):
    """The same of a convolution, whose output is (rows, out, positions)."""

    def forward(self, x: Tensor, y: Tensor, key: int | None) -> Tensor:
        return y + self.bias_delta.to(y.dtype).view(-1, *[1] * (y.dim() - 2))

    merged = BiasDelta.merged


def biases(model: nn.Module) -> dict[str, Tensor]:
    """{layer: its bias} of the layers that add it to what they give: those without parts, since BERT's head also keeps
    its decoder's bias under a name of its own."""
    leaves = {name: module for name, module in model.named_modules() if not list(module.children())}
    own = {name: module._parameters.get("bias") for name, module in leaves.items()}
    return {name: bias for name, bias in own.items() if bias is not None and bias.dim() == 1}


def bias_delta(layer: nn.Module, bias: Tensor) -> BiasDelta:
    """What trains ``bias``, the one that ``layer`` adds to its output."""
    return ChannelBiasDelta(bias) if isinstance(layer, nn.modules.conv._ConvNd) else BiasDelta(bias)

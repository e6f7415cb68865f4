"""Does the frozen base still hold the bits that it was loaded with?"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from loralab.models.sharded import local


def bits(model: nn.Module, owned: set[int]) -> dict[str, Tensor]:
    """{name: XOR over the bits of a tensor} of the parameters, saved buffers and packed weights of ``model``, but for
    those with their ``id`` in ``owned``. The results lie on the tensors' device: to read them would wait for it."""
    kept = set(model.state_dict())
    kept |= {f"{name}.{part}" for name, layer in model.named_modules() for part in getattr(layer, "packed_names", ())}
    named = {**dict(model.named_parameters()), **{name: b for name, b in model.named_buffers() if name in kept}}
    return {
        name: torch.hash_tensor(_as_integers(local(tensor.detach()))).view(torch.int64)
        for name, tensor in named.items()
        if id(tensor) not in owned and local(tensor).numel() and not tensor.is_meta and not tensor.is_complex()
    }


def _as_integers(tensor: Tensor) -> Tensor:
    """8-bit floating point has no XOR of its own."""
    return tensor.view(torch.uint8) if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """Names whose bits differ; a tensor that is not there any more, or is new, is none of them."""
    return [name for name, value in before.items() if name in after and int(value) != int(after[name])]

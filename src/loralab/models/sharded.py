"""trainer=fsdp: the frozen base spread over processes, a block at a time whole where it is computed (torch's FSDP 2).

QLoRA's packed bytes are spread like any other tensor: a group of tensors of several dtypes is gathered as bytes, so
that ``quantization.quant_storage`` need not be the dtype of the others. Adapters and their optimizers stay whole in
every process, as with trainer=ddp.
"""

import torch
from torch import nn

from loralab.adapters.blocks import last_stack
from loralab.quantization.linear import FrozenLinear


def shard(model: nn.Module, device: str, size: int) -> None:
    """Spreads the parameters and packed weights of ``model``, which no process may change, over ``size`` processes and
    moves what is left of them to ``device``. Outside of a pass of the whole model they are not whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for layer in model.modules():
        if isinstance(layer, FrozenLinear):
            _as_parameters(layer)
    mesh = init_device_mesh(device, (size,))
    for block in last_stack(model) or ():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _as_parameters(layer: FrozenLinear) -> None:
    """Registers the packed tensors, which are buffers, as parameters without gradients: only those are spread. A single
    number (the offset of double quantization) stays what it is."""
    for name in layer.packed_names:
        tensor = getattr(layer, name)
        if tensor.dim():
            del layer._buffers[name]
            layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that lies in this process; the tensor itself where it is not spread."""
    part = getattr(tensor, "to_local", None)
    return tensor if part is None else part()

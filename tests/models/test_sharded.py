"""A base that is spread over processes: which of its tensors are, and that they compute the same."""

import pytest
import torch

from loralab.models import sharded
from loralab.quantization.four_bit import FourBit


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_packed_bytes_become_parameters_without_gradients_and_compute_the_same(storage):
    layer = FourBit(double_quant=True, quant_storage=storage).convert(torch.nn.Linear(64, 32))
    x = torch.randn(3, 64, requires_grad=True)
    before = layer(x)
    (slope,) = torch.autograd.grad(before.sum(), x)
    sharded._as_parameters(layer)
    after = layer(x)
    assert torch.equal(after, before)
    assert torch.equal(torch.autograd.grad(after.sum(), x)[0], slope)
    own = dict(layer.named_parameters())
    assert {"codes", "absmax", "second_absmax"} < own.keys()
    assert not any(own[name].requires_grad for name in ("codes", "absmax", "second_absmax"))
    assert "offset" in dict(layer.named_buffers()), "a single number cannot be spread"
    assert sum(tensor.nbytes for tensor in layer.packed()) == sum(own[n].nbytes for n in own if n != "bias") + 4


def test_a_tensor_that_is_not_spread_is_its_own_part():
    tensor = torch.ones(2)
    assert sharded.local(tensor) is tensor

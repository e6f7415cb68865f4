"""The frozen layer, for every scheme: the same product in all modes, the right gradients, nothing kept
alive.
"""

import copy
import gc
import hashlib
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from loralab.quantization.base import dense_weight, is_linear, linear_shape
from loralab.quantization.four_bit import FourBit
from loralab.quantization.int8 import Int8Absmax, Int8ZeroPoint
from loralab.quantization.int8_blockwise import Int8Blockwise
from loralab.quantization.int8_product import Int8Product
from loralab.quantization.linear import FrozenLinear, dequantized, keep_dense, resident_bytes
from loralab.quantization.llm_int8 import LLMInt8

WEIGHT_ONLY = {
    "int8_tensor": Int8Absmax(granularity="tensor"),
    "int8_row": Int8Absmax(),
    "int8_block": Int8Absmax(granularity="block"),
    "nf4": FourBit(),
    "nf4_double": FourBit(double_quant=True),
    "fp4": FourBit(quant_type="fp4", block_size=32),
    "nf4_2048": FourBit(block_size=2048),
    "int8_zeropoint_tensor": Int8ZeroPoint(granularity="tensor"),
    "int8_zeropoint": Int8ZeroPoint(),
    "int8_blockwise": Int8Blockwise(block_size=128),
    "int4_row": FourBit(quant_type="int4", granularity="row"),
    "int4_tensor": FourBit(quant_type="int4", granularity="tensor"),
    "e2m1": FourBit(quant_type="e2m1"),
    "e3m0_double": FourBit(quant_type="e3m0", double_quant=True),
    "nf4_in_bf16": FourBit(quant_storage="bfloat16"),
}
PRODUCTS = {
    "absmax_tensor": Int8Product(granularity="tensor"),
    "absmax_row": Int8Product(granularity="row", threshold=6.0),
    "zeropoint_vector": Int8Product(zero_point=True, threshold=6.0),
}
SCHEMES = {**WEIGHT_ONLY, "llm_int8": LLMInt8(), "llm_int8_0": LLMInt8(threshold=0.0), **PRODUCTS}
every = pytest.mark.parametrize("spec", SCHEMES.values(), ids=SCHEMES.keys())
weight_only = pytest.mark.parametrize("spec", WEIGHT_ONLY.values(), ids=WEIGHT_ONLY.keys())


def dense_layer(out_features=48, in_features=64, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias=bias, dtype=dtype)


def inputs(*shape, dtype=torch.float32, grad=True):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return x.requires_grad_(grad)


def bytes_of(layer):
    digest = hashlib.sha256()
    for tensor in layer.packed():
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@weight_only
@pytest.mark.parametrize("bias", [True, False])
def test_product_and_gradient_equal_a_dense_layer_of_the_same_values(spec, bias):
    layer = spec.convert(dense_layer(bias=bias))
    twin = dense_layer(bias=bias)
    twin.weight.data = layer.dense(torch.float32)
    x, z = inputs(2, 5, 64), inputs(2, 5, 64)
    y, expected = layer(x), twin(z)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(y, expected)
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-5, atol=1e-5)
    if bias:
        torch.testing.assert_close(layer.bias.grad, twin.bias.grad)


@weight_only
def test_gradients_are_right_in_float64(spec):
    layer = spec.convert(dense_layer(out_features=8, in_features=256, dtype=torch.float64))
    x = inputs(2, 256, dtype=torch.float64)
    assert torch.autograd.gradcheck(layer, (x,), atol=1e-7)
    layer.bias.requires_grad_(True)
    bias = layer.bias
    layer(x).square().sum().backward()
    dense = layer.dense(torch.float64)
    torch.testing.assert_close(bias.grad, 2 * (x @ dense.t() + bias).sum(dim=0).detach())


@every
def test_training_equals_evaluation(spec):
    layer = spec.convert(dense_layer())
    x = inputs(3, 64)
    x.data[0, 7] = 9.0  # an outlier for LLM.int8()
    training = layer.train()(x)
    with torch.no_grad():
        evaluation = layer.eval()(x)
    with torch.inference_mode():
        inference = layer(x.detach().clone())
    assert torch.equal(training, evaluation)
    assert torch.equal(training, inference)


@every
@pytest.mark.parametrize("dequantize", ["per_use", "resident"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_and_bytes_survive_a_validation(spec, dequantize, dtype):
    spec = type(spec)(**{**vars(spec), "dequantize": dequantize})
    layer = spec.convert(dense_layer(out_features=64, dtype=dtype)).train()

    def gradient():
        x = inputs(4, 64, dtype=dtype)
        layer(x).float().square().sum().backward()
        return x.grad

    before, digest = gradient(), bytes_of(layer)
    with torch.inference_mode():
        layer.eval()(inputs(4, 64, dtype=dtype, grad=False))
    layer.train()
    assert torch.equal(gradient(), before)
    assert bytes_of(layer) == digest
    assert before.abs().sum() > 0


@every
def test_resident_gives_the_same_numbers_and_first_use_may_be_a_validation(spec):
    resident = type(spec)(**{**vars(spec), "dequantize": "resident"}).convert(dense_layer())
    layer = spec.convert(dense_layer())
    with torch.inference_mode():
        resident(inputs(2, 64, grad=False))
    x, z = inputs(2, 64), inputs(2, 64)
    layer(x).square().sum().backward()
    resident(z).square().sum().backward()
    assert torch.equal(x.grad, z.grad)
    assert layer.resident is None
    assert resident.resident is not None
    assert "resident" not in resident.state_dict()


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_that_keeps_its_dense_weights_and_then_frees_them_has_the_same_bits(spec, dtype):
    model = torch.nn.Sequential(spec.convert(dense_layer(dtype=dtype)))
    assert dequantized(model) == "per_use"  # auto, of which nobody has said more

    def values():
        x = inputs(3, 64, dtype=dtype)
        y = model(x)
        y.float().square().sum().backward()
        return y.detach(), x.grad

    before = values()
    for dequantize, held in (("resident", 64 * model[0].out_features * dtype.itemsize), ("per_use", 0)):
        keep_dense(model, dequantize)
        for _ in range(2):
            assert all(map(torch.equal, values(), before))
        assert (dequantized(model), resident_bytes(model)) == (dequantize, held)


@every
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(spec, reentrant):
    layer = spec.convert(dense_layer())
    x, z = inputs(2, 64), inputs(2, 64)
    layer(x).square().sum().backward()
    checkpoint(layer, z, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, z.grad)


@every
def test_neither_the_input_nor_the_dense_weight_is_kept_for_backward(spec):
    layer = spec.convert(dense_layer())
    seen = []
    unpack = layer.dense
    layer.dense = lambda dtype: seen.append(weakref.ref(w := unpack(dtype))) or w
    x = inputs(2, 64)
    h = x * 2.0  # h itself is needed by nobody but the layer
    dies = weakref.ref(h)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: pytest.fail("a tensor was saved"), lambda t: t):
        y = layer(h)
    del h
    gc.collect()
    assert dies() is None
    assert all(reference() is None for reference in seen)
    y.sum().backward()
    assert x.grad is not None


@every
def test_checkpointing_keeps_no_layer_input_alive(spec):
    """bitsandbytes' own int8 layer does: 2.8 GiB for a 7B base at 2,048 tokens."""
    layers = nn.Sequential(spec.convert(dense_layer(64)), spec.convert(dense_layer(64)), spec.convert(dense_layer(64)))
    seen = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, given: seen.append(weakref.ref(given[0])))
    x = inputs(2, 64)
    y = checkpoint(layers, x, use_reentrant=False)
    gc.collect()
    assert [reference() is None for reference in seen] == [False, True, True]  # the first is x itself
    y.sum().backward()
    assert x.grad is not None


@every
def test_bf16_autocast_computes_and_answers_as_a_dense_layer_does(spec):
    layer = spec.convert(dense_layer())
    x = inputs(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        with torch.no_grad():
            assert torch.equal(layer.eval()(x), y)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    weight = layer.dense(torch.bfloat16).float()
    torch.testing.assert_close(x.grad, weight.sum(dim=0).expand(4, -1), rtol=2e-2, atol=2e-2)


def test_autocast_equals_a_dense_layer_under_autocast():
    layer, twin = FourBit().convert(dense_layer()), dense_layer()
    twin.weight.data = layer.dense(torch.float32)
    x = inputs(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), twin(x))


@weight_only
def test_compute_dtype_is_where_the_product_happens_and_not_what_comes_out(spec):
    layer = type(spec)(**{**vars(spec), "compute_dtype": "bfloat16"}).convert(dense_layer(bias=False))
    x = inputs(3, 64)
    y = layer(x)
    assert y.dtype == torch.float32
    expected = nn.functional.linear(x.bfloat16(), layer.dense(torch.bfloat16)).float()
    assert torch.equal(y, expected)
    assert layer.weight.dtype == torch.bfloat16


@every
def test_casting_the_module_leaves_the_packed_data_alone(spec):
    layer = spec.convert(dense_layer())
    digest, dense = bytes_of(layer), layer.dense(torch.float32)
    for cast in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m.float()):
        cast(layer)
        assert bytes_of(layer) == digest
    assert torch.equal(layer.dense(torch.float32), dense)
    assert bytes_of(copy.deepcopy(layer)) == digest


@every
def test_what_other_code_asks_of_a_weight_is_answered(spec):
    layer = spec.convert(dense_layer(dtype=torch.bfloat16))
    assert layer.weight.shape == (48, 64)
    assert layer.weight.dtype == torch.bfloat16  # T5 casts hidden states to this
    assert layer.weight.device == layer.packed()[0].device
    assert layer.weight.untyped_storage().nbytes() == 2
    assert torch.isnan(layer.weight).all()
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert "in_features=64, out_features=48" in repr(layer)


@every
def test_conv1d_is_its_transposed_linear(spec):
    torch.manual_seed(0)
    conv = Conv1D(48, 64)
    linear = nn.Linear(64, 48)
    linear.weight.data, linear.bias.data = conv.weight.data.t().contiguous(), conv.bias.data.clone()
    assert linear_shape(conv) == linear_shape(linear) == (48, 64)
    assert torch.equal(dense_weight(conv), dense_weight(linear))
    a, b = spec.convert(conv), spec.convert(linear)
    assert bytes_of(a) == bytes_of(b)
    assert linear_shape(a) == (48, 64)
    assert is_linear(a)
    assert isinstance(a, FrozenLinear)
    assert torch.equal(dense_weight(a), dense_weight(b))


@every
def test_the_bias_is_the_same_object_and_the_dense_weight_can_die(spec):
    linear = dense_layer()
    layer = spec.convert(linear)
    assert layer.bias is linear.bias
    weight = weakref.ref(linear.weight)
    storages = {t.untyped_storage().data_ptr() for t in layer.packed()}
    assert linear.weight.untyped_storage().data_ptr() not in storages
    del linear
    gc.collect()
    assert weight() is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8)])
def test_what_a_layer_gives_may_be_changed_in_place_as_that_of_a_dense_layer(bias, shape):
    """RoCBert adds to its linear layer's output in place."""
    torch.manual_seed(0)
    dense = nn.Linear(8, 16, bias=bias).requires_grad_(False)
    frozen = FourBit().convert(dense)
    x = torch.randn(shape, requires_grad=True)
    y = frozen(x)
    y += 1.0
    y.square().sum().backward()
    other = x.detach().clone().requires_grad_()
    weight = frozen.dense(torch.float32)
    (nn.functional.linear(other, weight, dense.bias) + 1.0).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)

"""LLM.int8(): the product is the paper's, in both modes; the threshold acts."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from loralab.numerics import absmax
from loralab.quantization.base import dense_weight
from loralab.quantization.llm_int8 import LLMInt8

pytest.importorskip("bitsandbytes")


def layer_and_input(threshold, outlier=None, dtype=torch.float32):
    torch.manual_seed(0)
    linear = nn.Linear(128, 48, dtype=dtype)
    x = torch.randn(10, 128).to(dtype)
    if outlier is not None:
        x[2, 17] = outlier
    return LLMInt8(threshold=threshold).convert(linear), x


def by_definition(layer, x, threshold):
    """Integer product of row-wise codes plus the outlier columns in floating point."""
    outliers = (x.abs() >= threshold).any(dim=0) if threshold else torch.zeros(x.shape[1], dtype=torch.bool)
    rest = torch.where(x.abs() >= threshold, 0.0, x) if threshold else x
    codes, scale = absmax.quantize(rest)
    codes[:, outliers] = 0
    product = (
        (codes.long() @ layer.codes.long().t()).double() * scale[:, None].double() * layer.absmax.double() / 127**2
    )
    return product + x[:, outliers].double() @ dense_weight(layer)[:, outliers].double().t() + layer.bias.double()


@pytest.mark.parametrize(("threshold", "outlier"), [(0.0, None), (0.0, 30.0), (6.0, None), (6.0, 30.0), (1.0, 30.0)])
def test_forward_is_the_definition(threshold, outlier):
    layer, x = layer_and_input(threshold, outlier)
    for mode in (True, False):
        y = layer.train(mode)(x)
        torch.testing.assert_close(y.double(), by_definition(layer, x, threshold), rtol=1e-5, atol=1e-5)


def test_the_threshold_rescues_the_row_of_an_outlier():
    error = {}
    for threshold in (0.0, 6.0):
        layer, x = layer_and_input(threshold, outlier=60.0)
        exact = nn.functional.linear(x, dense_weight(layer), layer.bias)
        error[threshold] = (layer(x) - exact)[2].norm()
    assert error[6.0] < 0.2 * error[0.0]


def test_a_high_threshold_is_no_threshold():
    high, x = layer_and_input(100.0)
    none, _ = layer_and_input(0.0)
    assert torch.equal(high(x), none(x))


def test_the_input_is_not_written_to():
    layer, x = layer_and_input(6.0, outlier=30.0)
    before, version = x.clone(), x._version
    layer(x)
    assert torch.equal(x, before)
    assert x._version == version


def test_gradient_is_straight_through():
    layer, x = layer_and_input(6.0, outlier=30.0)
    x.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, dense_weight(layer).sum(dim=0).expand_as(x))


def test_rows_are_independent_only_without_a_threshold():
    free, x = layer_and_input(0.0, outlier=30.0)
    assert torch.equal(free(x)[:2], free(x[:2]))
    bound, _ = layer_and_input(6.0)
    assert not torch.equal(bound(x)[:2], bound(x[:2]))


def test_rows_of_zeros_and_leading_dimensions():
    layer, x = layer_and_input(6.0)
    x[4] = 0.0
    y = layer(x.view(2, 5, 128))
    assert y.shape == (2, 5, 48)
    torch.testing.assert_close(y.view(10, 48)[4], layer.bias)


def test_shapes_are_known_under_fake_tensors():
    with FakeTensorMode():
        layer = LLMInt8().convert(nn.Linear(64, 32))
        x = torch.randn(2, 3, 64, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad.shape == (2, 3, 64)


def test_bfloat16_in_and_out():
    layer, x = layer_and_input(6.0, outlier=30.0, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    exact = nn.functional.linear(x.float(), dense_weight(layer).float(), layer.bias.float())
    assert (y.float() - exact).norm() / exact.norm() < 0.03

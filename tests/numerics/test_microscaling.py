"""MXFP4 and NVFP4 against ml_dtypes' rounding and formulas written out anew in float64."""

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from loralab.errors import ConfigError
from loralab.numerics import microscaling
from loralab.quantization.base import dense_weight
from loralab.quantization.microscaling import Microscaled

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def drawn(*shape, scale=0.02):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * scale


def e2m1(values):
    return np.clip(values, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float64)


def mxfp4(weight):
    """Row by row, block by block."""
    out = np.zeros_like(weight)
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], 32):
            block = weight[row, start : start + 32]
            if largest := np.abs(block).max():
                scale = 2.0 ** (np.floor(np.log2(largest)) - 2)
                out[row, start : start + 32] = e2m1((block / scale).astype(np.float32)) * scale
    return out


def nvfp4(weight):
    whole = np.float32(np.abs(weight).max()) / np.float32(6 * 448)
    out = np.zeros_like(weight)
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], 16):
            block = weight[row, start : start + 16].astype(np.float32)
            ratio = np.abs(block).max() / np.float32(6) / whole
            scale = np.float32(min(ratio, 448).astype(ml_dtypes.float8_e4m3fn)) * whole
            if scale:
                out[row, start : start + 16] = e2m1(block / scale) * np.float64(scale)
    return out


REFERENCES = {"mxfp4": mxfp4, "nvfp4": nvfp4}


def quantized(kind, weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    return Microscaled(format=kind).convert(layer)


def test_the_codes_are_those_of_ml_dtypes_halves_and_signs_included():
    values = torch.cat([torch.arange(-32, 33) / 4.0 * 0.75, torch.arange(-24, 25) / 4.0, drawn(4000, scale=3.0)])
    ours = microscaling.e2m1_values(microscaling.e2m1_codes(values))
    assert np.array_equal(ours.numpy(), e2m1(values.numpy()))
    assert np.array_equal(np.signbit(ours.numpy()), np.signbit(e2m1(values.numpy())))


@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.parametrize("shape", [(64, 128), (3, 50), (5, 1), (1, 33)])
def test_the_weight_is_the_reference_s(kind, shape):
    weight = drawn(*shape)
    weight[0, :17] = 0.0  # a block of zeros, where there are 16 to a block
    weight[-1, -1] = 1.7  # cut, where it stands above 6 powers of two
    found = dense_weight(quantized(kind, weight))
    assert found.shape == weight.shape
    np.testing.assert_allclose(found.double().numpy(), REFERENCES[kind](weight.double().numpy()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e30])
def test_the_error_does_not_hang_on_the_scale(kind, scale):
    weight = drawn(32, 64, scale=1.0)
    plain, scaled = (dense_weight(quantized(kind, weight * s)) / s for s in (1.0, 2.0 ** round(np.log2(scale))))
    torch.testing.assert_close(scaled, plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", REFERENCES)
def test_zeros_stay_zeros(kind):
    assert not dense_weight(quantized(kind, torch.zeros(4, 40))).any()


@pytest.mark.parametrize(("kind", "bits"), [("mxfp4", 4.25), ("nvfp4", 4.5 + 32 / (512 * 1024))])
def test_the_bits_of_a_large_matrix(kind, bits):
    assert Microscaled(format=kind).storage_bits(512, 1024) / (512 * 1024) == bits


def test_the_error_on_normal_weights_is_ordered_as_the_bits_are():
    """4.25, 4.5 and, by QLoRA's FP4 in blocks of 64 with float32 scales, 4.5 bits."""
    weight = drawn(512, 1024)
    mx, nv = (float((dense_weight(quantized(kind, weight)) - weight).norm() / weight.norm()) for kind in REFERENCES)
    assert 0.09 < nv < mx < 0.13


def test_another_format_is_refused_by_name():
    with pytest.raises(ConfigError, match="quantization.format"):
        Microscaled(format="mxfp6")

"""The int8 products of LLM.int8()'s table 1 against integer arithmetic and against bitsandbytes."""

import numpy as np
import pytest
import torch

from loralab.numerics import absmax, affine, int8_product

KINDS = [(g, z) for g in int8_product.GRANULARITIES for z in (False, True)]


def matrices(seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(6, 48, generator=random), torch.randn(10, 48, generator=random)


def codes(matrix, granularity, zero_point):
    """(integers less their zero point, scale of a row) by the formulas."""
    if zero_point:
        found, scale, zero = affine.quantize(matrix, granularity)
        return found.double() - zero.double()[:, None], scale.double()
    found, largest = absmax.quantize(matrix, granularity)
    return found.double(), largest.double() / 127


@pytest.mark.parametrize(("granularity", "zero_point"), KINDS)
def test_it_is_the_integer_product_rescaled(granularity, zero_point):
    x, weight = matrices()
    for_x, for_w = int8_product.GRANULARITIES[granularity]
    cx, sx = codes(x, for_x, zero_point)
    cw, sw = codes(weight, for_w, zero_point)
    exact = (cx @ cw.t()) * sx[:, None] * sw[None, :]
    stored = int8_product.through_int8(weight, for_w, zero_point)
    found = int8_product.product(x, stored, granularity, zero_point, 0.0, None)
    torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=2e-6)


def test_vector_wise_absmax_is_bitsandbytes_product():
    ops = pytest.importorskip("bitsandbytes") and torch.ops.bitsandbytes
    x, weight = matrices()
    cx, ax, _ = ops.int8_vectorwise_quant(x.clone(), 0.0)
    cw, aw, _ = ops.int8_vectorwise_quant(weight.clone(), 0.0)
    theirs = ops.int8_linear_matmul(cx, cw).float() * ax[:, None] * aw[None, :] / 127**2
    stored = int8_product.through_int8(weight, "row", False)
    torch.testing.assert_close(
        int8_product.product(x, stored, "vector", False, 0.0, None), theirs, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(("granularity", "zero_point"), KINDS)
def test_outlier_columns_are_taken_out_before_the_scale_is(granularity, zero_point):
    x, weight = matrices()
    x[2, 5] = 60.0
    stored = int8_product.through_int8(weight, int8_product.GRANULARITIES[granularity][1], zero_point)
    exact = x @ stored.t()

    def error(threshold):
        found = int8_product.product(x, stored, granularity, zero_point, threshold, stored)
        return float((found - exact).norm())

    assert error(6.0) < 0.25 * error(0.0)
    everything = int8_product.product(x, stored, granularity, zero_point, 1e-9, weight.half())
    assert torch.equal(everything, x.half().float() @ weight.half().float().t())  # every column is an outlier


def by_numpy(x, weight, granularity, zero_point, threshold):
    """LLM.int8() equation 8 in float64: int8 for the columns without an outlier, float16 for the others."""
    x, weight = x.numpy().astype(np.float64), weight.numpy().astype(np.float64)

    def through_int8(matrix, per):
        axis = None if per == "tensor" else 1
        if not zero_point:
            scale = np.abs(matrix).max(axis=axis, keepdims=True) / 127
            return np.round(matrix / scale) * scale
        low = np.minimum(matrix.min(axis=axis, keepdims=True), 0)
        step = (np.maximum(matrix.max(axis=axis, keepdims=True), 0) - low) / 254
        return (
            np.clip(np.round(matrix / step) - 127 - np.round(low / step), -127, 127) + 127 + np.round(low / step)
        ) * step

    per_x, per_w = {"tensor": ("tensor", "tensor"), "row": ("row", "tensor"), "vector": ("row", "row")}[granularity]
    outliers = (np.abs(x) >= threshold).any(axis=0)
    inside = through_int8(np.where(outliers, 0, x), per_x)[:, ~outliers] @ through_int8(weight, per_w)[:, ~outliers].T
    sixteen = [matrix[:, outliers].astype(np.float16).astype(np.float64) for matrix in (x, weight)]
    return inside + sixteen[0] @ sixteen[1].T


@pytest.mark.parametrize(("granularity", "zero_point"), KINDS)
def test_outlier_columns_of_x_and_of_w_are_in_16_bits(granularity, zero_point):
    x, weight = matrices(3)
    x[:, [5, 30]] = 40 + x[:, [5, 30]]
    expected = by_numpy(x, weight, granularity, zero_point, 6.0)
    stored = int8_product.through_int8(weight, int8_product.GRANULARITIES[granularity][1], zero_point)
    found = int8_product.product(x, stored, granularity, zero_point, 6.0, int8_product.in_16_bits(weight))
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    of_int8 = int8_product.product(x, stored, granularity, zero_point, 6.0, stored)
    exact = x @ weight.t()
    assert (found - exact).norm() < 0.5 * (of_int8 - exact).norm()


@pytest.mark.parametrize(
    ("matrix", "dtype"),
    [
        (torch.ones(2, 2), torch.float16),
        (torch.full((2, 2), 2e18), torch.bfloat16),
        (torch.full((2, 2), 2e-38), torch.bfloat16),
        (torch.ones(2, 2, dtype=torch.bfloat16), torch.bfloat16),
        (torch.ones(2, 2, dtype=torch.float64), torch.float16),
    ],
)
def test_16_bits_are_those_that_hold_the_largest_value(matrix, dtype):
    found = int8_product.in_16_bits(matrix)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), matrix.double(), rtol=2**-8, atol=0)


def test_finer_scales_do_not_lose():
    x, weight = matrices()
    errors = {}
    for granularity, (_, for_w) in int8_product.GRANULARITIES.items():
        stored = int8_product.through_int8(weight, for_w, False)
        errors[granularity] = float(
            (int8_product.product(x, stored, granularity, False, 0.0, None) - x @ weight.t()).norm()
        )
    assert errors["vector"] < errors["row"] < errors["tensor"]

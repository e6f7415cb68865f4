"""The int8 products of LLM.int8()'s table 1 against integer arithmetic and against bitsandbytes."""

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
    found = int8_product.product(x, stored, granularity, zero_point, 0.0)
    torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=2e-6)


def test_vector_wise_absmax_is_bitsandbytes_product():
    ops = pytest.importorskip("bitsandbytes") and torch.ops.bitsandbytes
    x, weight = matrices()
    cx, ax, _ = ops.int8_vectorwise_quant(x.clone(), 0.0)
    cw, aw, _ = ops.int8_vectorwise_quant(weight.clone(), 0.0)
    theirs = ops.int8_linear_matmul(cx, cw).float() * ax[:, None] * aw[None, :] / 127**2
    stored = int8_product.through_int8(weight, "row", False)
    torch.testing.assert_close(int8_product.product(x, stored, "vector", False, 0.0), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("granularity", "zero_point"), KINDS)
def test_outlier_columns_are_taken_out_before_the_scale_is(granularity, zero_point):
    x, weight = matrices()
    x[2, 5] = 60.0
    stored = int8_product.through_int8(weight, int8_product.GRANULARITIES[granularity][1], zero_point)
    exact = x @ stored.t()

    def error(threshold):
        return float((int8_product.product(x, stored, granularity, zero_point, threshold) - exact).norm())

    assert error(6.0) < 0.25 * error(0.0)
    assert error(1e-9) == pytest.approx(0.0, abs=1e-4)  # every column is an outlier


def test_finer_scales_do_not_lose():
    x, weight = matrices()
    errors = {}
    for granularity, (_, for_w) in int8_product.GRANULARITIES.items():
        stored = int8_product.through_int8(weight, for_w, False)
        errors[granularity] = float((int8_product.product(x, stored, granularity, False, 0.0) - x @ weight.t()).norm())
    assert errors["vector"] < errors["row"] < errors["tensor"]

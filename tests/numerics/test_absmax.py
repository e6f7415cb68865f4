"""int8 absmax against its definition and against bitsandbytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loralab.numerics import absmax


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 70),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_rows_equal_bitsandbytes(rows, columns, scale, dtype, seed):
    ops = pytest.importorskip("bitsandbytes") and torch.ops.bitsandbytes
    weight = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
    codes, largest = absmax.quantize(weight, "row")
    theirs, statistics, _ = ops.int8_vectorwise_quant(weight.clone(), 0.0)
    assert torch.equal(codes, theirs)
    assert torch.equal(largest, statistics)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 50),
    granularity=st.sampled_from(absmax.GRANULARITIES),
    block_size=st.sampled_from([8, 32, 64]),
    seed=st.integers(0, 2**31),
)
def test_error_is_at_most_half_a_step(rows, columns, granularity, block_size, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    codes, largest = absmax.quantize(weight, granularity, block_size)
    back = absmax.dequantize(codes, largest, granularity, block_size)
    assert back.shape == weight.shape
    assert codes.dtype == torch.int8
    step = absmax.groups(torch.ones_like(weight), granularity, block_size) * (largest / 127)[:, None]
    step = step.reshape(-1)[: weight.numel()].view_as(weight)
    assert bool(((back - weight).abs() <= step * 0.5001).all())


@pytest.mark.parametrize("granularity", absmax.GRANULARITIES)
def test_zeros_and_tiny_values_stay_finite(granularity):
    for value in (0.0, 1e-38, 1e-45):
        codes, largest = absmax.quantize(torch.full((4, 16), value), granularity, 8)
        assert bool(torch.isfinite(absmax.dequantize(codes, largest, granularity, 8)).all())
        assert not codes.any()


def test_one_outlier_ruins_a_tensor_and_only_one_row_of_rows():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    weight[3, 5] = 500.0
    error = {}
    for granularity in ("tensor", "row", "block"):
        back = absmax.dequantize(*absmax.quantize(weight, granularity, 32), granularity, 32)
        rest = torch.arange(64) != 3
        error[granularity] = (back - weight)[rest].norm() / weight[rest].norm()
    assert error["tensor"] > 0.3
    assert error["row"] < 0.02
    assert error["block"] < 0.02


def test_largest_magnitude_is_exact_and_signs_are_symmetric():
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    codes, largest = absmax.quantize(weight)
    mirrored, same = absmax.quantize(-weight)
    assert torch.equal(codes, -mirrored)
    assert torch.equal(largest, same)
    assert codes.abs().amax(dim=1).eq(127).all()

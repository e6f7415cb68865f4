"""int8 by range and zero point against its definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loralab.numerics import absmax, affine


def seeded(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 50),
    granularity=st.sampled_from(absmax.GRANULARITIES),
    scale=st.sampled_from([1e-6, 1.0, 1e30]),
    shift=st.sampled_from([-3.0, 0.0, 1.5]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_error_is_at_most_a_step_and_zero_is_exact(rows, columns, granularity, scale, shift, dtype, seed):
    weight = ((seeded(rows, columns, seed) + shift) * scale).to(dtype)
    weight[0, 0] = 0.0
    codes, step, zero = affine.quantize(weight, granularity, 8)
    back = affine.dequantize(codes, step, zero, granularity, 8)
    assert codes.dtype == zero.dtype == torch.int8
    assert back.shape == weight.shape
    assert back[0, 0] == 0.0
    steps = absmax.groups(torch.ones(rows, columns), granularity, 8) * step[:, None]
    steps = steps.reshape(-1)[: weight.numel()].view_as(weight)
    # half a step of its own, and at the ends half a step more for the rounding of the zero point
    assert bool(((back - weight.float()).abs() <= steps * 1.001).all())
    inside = (codes > -127) & (codes < 127)
    assert bool(((back - weight.float()).abs() <= steps * 0.501)[inside].all())


def test_a_one_sided_row_gets_twice_the_precision_of_absmax():
    weight = seeded(64, 512).abs()
    by_range = affine.dequantize(*affine.quantize(weight, "row"), "row") - weight
    by_absmax = absmax.dequantize(*absmax.quantize(weight, "row"), "row") - weight
    assert float(by_range.norm() / by_absmax.norm()) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("granularity", absmax.GRANULARITIES)
@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-45, 5.0, -5.0, 3e38])
def test_constants_come_back(granularity, value):
    weight = torch.full((4, 16), value)
    back = affine.dequantize(*affine.quantize(weight, granularity, 8), granularity, 8)
    torch.testing.assert_close(back, weight, rtol=1e-6, atol=1e-36)


def test_both_ends_of_the_range_are_reached_when_the_zero_point_is_whole():
    weight = torch.tensor([[-1.0, 0.0, 253.0]])
    codes, scale, zero = affine.quantize(weight, "tensor")
    assert codes.tolist() == [[-127, -126, 127]]
    assert (scale.item(), zero.item()) == (1.0, -126)

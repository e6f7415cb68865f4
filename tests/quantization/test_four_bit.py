"""4-bit layers: bitsandbytes' bytes, and the guard against its kernels where they unpack wrongly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from loralab.numerics import blockwise, codebooks
from loralab.quantization import kernels
from loralab.quantization.four_bit import FourBit
from loralab.quantization.kernels import KERNEL_BLOCKS

functional = pytest.importorskip("bitsandbytes.functional")


def reference(weight, spec, layer=None):
    """(out, in) through loralab.numerics alone; the second level from the bytes of ``layer``."""
    code = codebooks.table(spec.quant_type)
    codes, absmax = blockwise.quantize_blockwise(weight, code, spec.block_size)
    if layer is not None and layer.double_quant:
        absmax = blockwise.undo_double_quantize(layer.absmax, layer.second_absmax, layer.offset)
    return blockwise.dequantize_blockwise(codes, absmax, code, spec.block_size).view(weight.shape)


@settings(max_examples=60, deadline=None)
@given(
    out_features=st.integers(1, 40),
    in_features=st.sampled_from([2, 16, 48, 63, 64, 96, 160, 192, 256]),
    block_size=st.sampled_from(KERNEL_BLOCKS),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    double_quant=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_every_shape_unpacks_to_the_reference(
    out_features, in_features, block_size, quant_type, double_quant, dtype, seed
):
    spec = FourBit(quant_type=quant_type, block_size=block_size, double_quant=double_quant)
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)).to(dtype)
    layer = spec.pack(weight, None)
    expected = reference(weight, spec, layer)
    assert torch.equal(layer.dense(torch.float32), expected)
    assert torch.equal(layer.dense(dtype), expected.to(dtype))


@pytest.mark.parametrize("double_quant", [False, True])
def test_storage_is_bitsandbytes_own(double_quant):
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    layer = FourBit(double_quant=double_quant).pack(weight, None)
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=double_quant, quant_type="nf4")
    assert torch.equal(layer.codes, packed)
    assert torch.equal(layer.absmax, state.absmax)
    if double_quant:
        assert torch.equal(layer.second_absmax, state.state2.absmax)
        assert torch.equal(layer.offset, state.offset)
    assert torch.equal(layer.dense(torch.float32), functional.dequantize_4bit(packed, state))


def faulty_kernel(packed, absmax, quant_type, block_size, shape, dtype):
    """What bitsandbytes 0.50.2 does on CPUs with AVX-512: width // block_size whole blocks to a row."""
    codes = blockwise.unpack_4bit(packed, shape[0] * shape[1]).view(shape)
    block = torch.arange(shape[0])[:, None] * (shape[1] // block_size) + torch.arange(shape[1]) // block_size
    return (codebooks.table(quant_type)[codes.long()] * absmax[block]).to(dtype)


def relative_error(layer, weight):
    return ((layer.dense(torch.float32) - weight).norm() / weight.norm()).item()


@pytest.fixture
def fresh_probe():
    kernels.tried.cache_clear()
    yield
    kernels.tried.cache_clear()


@pytest.mark.usefixtures("fresh_probe")
@pytest.mark.parametrize(("width", "block_size"), [(96, 64), (160, 64), (384, 256), (64, 128)])
def test_a_kernel_that_counts_blocks_by_rows_is_noticed_and_not_used(monkeypatch, width, block_size):
    weight = torch.randn(64, width, generator=torch.Generator().manual_seed(0)) * torch.rand(64, 1)
    spec = FourBit(block_size=block_size)
    layer = spec.pack(weight, None)
    monkeypatch.setattr(kernels, "_kernel", faulty_kernel)
    assert torch.equal(layer.dense(torch.float32), reference(weight, spec))
    guarded = relative_error(layer, weight)
    monkeypatch.setattr(kernels, "kernel_is_correct", lambda *_: True)
    assert relative_error(layer, weight) > 1.2 * guarded


@pytest.mark.usefixtures("fresh_probe")
@pytest.mark.parametrize(("width", "block_size"), [(96, 64), (352, 64), (384, 256), (64, 128)])
def test_without_the_guard_the_real_kernel_is_wrong_on_some_cpus(monkeypatch, width, block_size):
    if kernels.kernel_is_correct("nf4", block_size, width, torch.float32, torch.device("cpu")):
        pytest.skip(
            f"bitsandbytes unpacks width {width} rightly on this CPU ({torch.backends.cpu.get_cpu_capability()})"
        )
    weight = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    layer = FourBit(block_size=block_size).pack(weight, None)
    guarded = relative_error(layer, weight)
    monkeypatch.setattr(kernels, "kernel_is_correct", lambda *_: True)
    assert relative_error(layer, weight) > 1.2 * guarded


@pytest.mark.usefixtures("fresh_probe")
def test_aligned_widths_use_the_kernel(monkeypatch):
    used = []
    kernel = kernels._kernel
    monkeypatch.setattr(kernels, "_kernel", lambda *a: used.append(a[4]) or kernel(*a))
    layer = FourBit().pack(torch.randn(32, 128), None)
    layer.dense(torch.float32)
    layer.dense(torch.float32)
    assert used.count((32, 128)) == 2


def test_equal_statistics_survive_double_quantization():
    """All absmax equal: nothing is left once their mean is taken off."""
    weight = torch.full((8, 64), 0.5)
    assert torch.equal(FourBit(double_quant=True).pack(weight, None).dense(torch.float32), weight)


def test_the_probe_leaves_the_random_state_alone():
    kernels.tried.cache_clear()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    FourBit().pack(torch.ones(8, 96), None).dense(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_works_under_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layer = FourBit(double_quant=True).pack(torch.randn(32, 96), None)
        x = torch.randn(2, 96, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.shape == (2, 32)
        assert x.grad.shape == x.shape
    real = FourBit(double_quant=True).convert(nn.Linear(96, 32))
    assert torch.isfinite(real(torch.randn(2, 96))).all()

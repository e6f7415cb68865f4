"""Every scheme against its formula and bitsandbytes, on any shape; and the bits it takes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from loralab.errors import ConfigError
from loralab.numerics import blockwise, codebooks
from loralab.quantization.base import measure
from loralab.quantization.four_bit import STORAGE, FourBit
from loralab.quantization.int8 import Int8Absmax, Int8ZeroPoint
from loralab.quantization.int8_blockwise import Int8Blockwise
from loralab.quantization.int8_product import Int8Product

functional = pytest.importorskip("bitsandbytes.functional")


def seeded(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def linear(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data = weight
    return layer


FILLINGS = {
    "normal": lambda w: w,
    "zeros": torch.zeros_like,
    "constant": lambda w: torch.full_like(w, -0.3),
    "a zero block": lambda w: torch.where(torch.arange(w.shape[1]) < 64, 0.0, w),
    "huge": lambda w: w * 1e30,
    "mixed": lambda w: w * torch.logspace(-12, 12, w.shape[1]),
}


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 24),
    columns=st.sampled_from([2, 16, 63, 64, 80, 96, 160, 192, 256]),
    quant_type=st.sampled_from(codebooks.FOUR_BIT),
    granularity=st.sampled_from(["block", "row", "tensor"]),
    block_size=st.sampled_from([32, 64, 128, 4096]),
    double_quant=st.booleans(),
    filling=st.sampled_from(list(FILLINGS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_every_4_bit_scheme_unpacks_to_the_formula(
    rows, columns, quant_type, granularity, block_size, double_quant, filling, dtype, seed
):
    if double_quant and granularity == "tensor":
        granularity = "row"
    spec = FourBit(quant_type=quant_type, granularity=granularity, block_size=block_size, double_quant=double_quant)
    weight = FILLINGS[filling](seeded(rows, columns, seed)).to(dtype)
    layer = spec.pack(weight, None)
    code, block = codebooks.table(quant_type), spec.block(rows, columns)
    codes, absmax = blockwise.quantize_blockwise(weight, code, block)
    if double_quant:
        absmax = blockwise.undo_double_quantize(layer.absmax, layer.second_absmax, layer.offset)
    expected = blockwise.dequantize_blockwise(codes, absmax, code, block).view(rows, columns)
    assert torch.equal(layer.dense(torch.float32), expected)
    assert torch.isfinite(expected).all()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 24),
    columns=st.integers(1, 300),
    block_size=st.sampled_from((64, 128, 256, 512, 1024, 2048, 4096)),
    filling=st.sampled_from([name for name in FILLINGS if name != "a zero block"]),
    seed=st.integers(0, 2**31),
)
def test_blockwise_int8_is_bitsandbytes_and_near_the_nearest_code(rows, columns, block_size, filling, seed):
    weight = FILLINGS[filling](seeded(rows, columns, seed))
    layer = Int8Blockwise(block_size=block_size).pack(weight, None)
    theirs, state = functional.quantize_blockwise(weight, blocksize=block_size)
    assert torch.equal(layer.codes, theirs)
    assert torch.equal(layer.absmax, state.absmax)
    dense = layer.dense(torch.float32)
    assert torch.equal(dense, functional.dequantize_blockwise(theirs, state))
    codes, absmax = blockwise.quantize_blockwise(weight, codebooks.dynamic_map(), block_size)
    nearest = blockwise.dequantize_blockwise(codes, absmax, codebooks.dynamic_map(), block_size).view(rows, columns)
    scale = absmax.repeat_interleave(block_size)[: weight.numel()].view(rows, columns)
    # its CPU kernel looks codes up in a table of some 2^16 steps
    assert bool(((dense - weight).abs() <= (nearest - weight).abs() + scale * 2.0**-14).all())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("quant_type", codebooks.FOUR_BIT)
def test_four_bits_and_their_statistics(quant_type, block_size, double_quant):
    spec = FourBit(quant_type=quant_type, block_size=block_size, double_quant=double_quant)
    layer = spec.convert(linear(seeded(512, 2048)))
    n = 512 * 2048
    blocks = n // block_size
    second = 32 * -(-blocks // 256) + 32
    expected = 4 + (8 * blocks + second if double_quant else 32 * blocks) / n
    assert measure(nn.ModuleList([layer])).bits_per_parameter == expected == spec.storage_bits(512, 2048) / n


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        (Int8Absmax(granularity="tensor"), 8 + 32 / (128 * 256)),
        (Int8Absmax(), 8 + 32 / 256),
        (Int8Absmax(granularity="block", block_size=256), 8 + 32 / 256),
        (Int8ZeroPoint(granularity="tensor"), 8 + 40 / (128 * 256)),
        (Int8ZeroPoint(), 8 + 40 / 256),
        (Int8Blockwise(block_size=256), 8.125),
        (Int8Product(granularity="row"), 8 + 32 / (128 * 256)),
        (Int8Product(zero_point=True), 8 + 40 / 256),
        (Int8Product(threshold=6.0), 8 + 32 / 256 + 16),  # W in 16 bits too, for the columns that turn out outliers
        (FourBit(quant_type="int4", granularity="tensor"), 4 + 32 / (128 * 256)),
        (FourBit(quant_type="int4", granularity="row"), 4 + 32 / 256),
        (FourBit(quant_storage="bfloat16"), 4.5),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_bits_are_the_sum_of_what_is_stored(spec, bits):
    layer = spec.convert(linear(seeded(128, 256)))
    assert measure(nn.ModuleList([layer])).bits_per_parameter == bits == spec.storage_bits(128, 256) / (128 * 256)


@pytest.mark.parametrize("storage", STORAGE)
def test_quant_storage_holds_the_same_bytes_through_every_cast(storage):
    weight = seeded(32, 128)
    plain, other = (FourBit(quant_storage=name).pack(weight, None) for name in ("uint8", storage))
    assert other.codes.dtype == STORAGE[storage]
    for cast in (lambda m: m, lambda m: m.half(), lambda m: m.double(), lambda m: m.to(torch.bfloat16)):
        assert torch.equal(cast(other).codes.view(-1).view(torch.uint8), plain.codes.view(-1))
    assert torch.equal(other.dense(torch.float32), plain.dense(torch.float32))


@pytest.mark.parametrize(
    ("spec", "shape", "says"),
    [
        (FourBit(quant_storage="float32"), (3, 66), "the 99 packed bytes of m.proj are not a multiple of its 4"),
        (FourBit(block_size=4096), (16, 16), "block_size = 4096 is larger than m.proj, which has 16 x 16 = 256"),
        (Int8Blockwise(block_size=4096), (16, 16), "block_size = 4096 is larger than m.proj"),
        (Int8ZeroPoint(granularity="block", block_size=512), (16, 16), "block_size = 512 is larger than m.proj"),
        (FourBit(block_size=32), (0, 64), "larger than m.proj"),
        (Int8Absmax(), (0, 64), "the weight of m.proj has shape (0, 64)"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_the_name_of_the_layer(spec, shape, says):
    with pytest.raises(ConfigError) as refused:
        spec.convert(linear(torch.ones(shape)), "m.proj")
    assert says in str(refused.value)


@pytest.mark.parametrize(
    "spec", [Int8Absmax(), Int8ZeroPoint(), Int8Blockwise(block_size=64), FourBit(), Int8Product()]
)
def test_a_weight_of_one_dimension_is_refused(spec):
    layer = nn.Linear(64, 64)
    layer.weight = nn.Parameter(torch.ones(64 * 64))
    with pytest.raises(ConfigError, match=r"the weight of m\.proj has shape \(4096,\)"):
        spec.convert(layer, "m.proj")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "spec", [Int8ZeroPoint(), Int8Blockwise(block_size=64), FourBit(quant_type="e2m1"), Int8Product()]
)
def test_values_that_are_not_finite_are_refused_by_the_name_of_the_layer(spec, value):
    weight = seeded(64, 64)
    weight[3, 4] = value
    with pytest.raises(ConfigError, match=r"the weight of m\.proj, \(64, 64\), holds nan or infinite"):
        spec.convert(linear(weight), "m.proj")


@pytest.mark.parametrize(
    ("cls", "keys", "says"),
    [
        (FourBit, {"quant_type": "e2m"}, "did you mean e2m1"),
        (FourBit, {"granularity": "column"}, "quantization.granularity='column'"),
        (FourBit, {"granularity": "tensor", "double_quant": True}, "double_quant=true quantizes many absmax"),
        (FourBit, {"quant_storage": "int8"}, "did you mean uint8"),
        (Int8Blockwise, {"block_size": 100}, "quantization.block_size=100"),
        (Int8Product, {"granularity": "block"}, "quantization.granularity='block'"),
        (Int8Product, {"threshold": float("nan")}, "quantization.threshold must be a number of at least 0, got nan"),
    ],
)
def test_keys_out_of_range_are_refused(cls, keys, says):
    with pytest.raises(ConfigError) as refused:
        cls(**keys)
    assert says in str(refused.value)


def test_a_product_that_looks_at_the_whole_batch_is_not_packable():
    assert Int8Product(granularity="vector").packable
    assert not Int8Product(granularity="tensor").packable
    assert not Int8Product(threshold=6.0).packable

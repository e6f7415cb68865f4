"""The code books against the published table and against bitsandbytes."""

import pytest
import torch

from loralab.numerics import codebooks

# As printed in the QLoRA code and in bitsandbytes.
PUBLISHED_NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
]


def test_nf4_generator_gives_the_published_table_bitwise():
    assert torch.equal(codebooks.nf4(), torch.tensor(PUBLISHED_NF4, dtype=torch.float32))


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_four_bit_tables_equal_bitsandbytes_bitwise(name):
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(codebooks.table(name), functional.get_4bit_type(name, device="cpu"))


def test_e2m1_and_e3m0_are_the_formats_of_their_names_and_not_bitsandbytes_fp4():
    def values(exponent_bits, mantissa_bits, bias):
        found = set()
        for exponent in range(2**exponent_bits):
            for mantissa in range(2**mantissa_bits):
                share = mantissa / 2**mantissa_bits
                subnormal = exponent == 0 and (mantissa_bits or share == 0)
                found.add(share * 2.0 ** (1 - bias) if subnormal else (1 + share) * 2.0 ** (exponent - bias))
        top = max(found)
        return sorted({sign * value / top for value in found for sign in (-1, 1)})

    assert values(2, 1, 1) == pytest.approx(sorted(set(codebooks.table("e2m1").tolist())), abs=1e-7)
    assert values(3, 0, 3) == pytest.approx(sorted(set(codebooks.table("e3m0").tolist())), abs=1e-7)
    steps = {name: min(v for v in codebooks.table(name).tolist() if v > 0) for name in ("fp4", "e2m1")}
    assert steps == pytest.approx({"fp4": 0.0625 / 12, "e2m1": 0.5 / 6})


def test_int4_is_fifteen_even_steps():
    assert torch.equal(codebooks.table("int4"), torch.arange(-7, 8) / 7.0)


def test_dynamic_map_equals_bitsandbytes_bitwise():
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(codebooks.dynamic_map(), functional.create_dynamic_map(signed=True))


def test_equation_4_taken_literally_is_not_nf4():
    """q_i = (Q(i / 17) + Q((i + 1) / 17)) / 2 has infinite ends; its 15 finite values are symmetric, NF4 is
    not.
    """
    inverse = torch.distributions.Normal(0.0, 1.0).icdf(torch.arange(0, 18) / 17)
    literal = (inverse[:-1] + inverse[1:]) / 2
    assert torch.isinf(literal[[0, -1]]).all()
    finite = literal[1:-1] / literal[1:-1].max()
    assert torch.allclose(finite, -finite.flip(0), atol=1e-5)
    assert not torch.allclose(codebooks.nf4(), -codebooks.nf4().flip(0), atol=1e-2)


def test_a_table_made_under_fake_tensors_is_not_kept():
    from torch._subclasses.fake_tensor import FakeTensorMode

    codebooks._tables.clear()
    with FakeTensorMode():
        codebooks.nf4()
    assert type(codebooks.nf4()) is torch.Tensor
    assert codebooks.nf4()[0].item() == -1.0
    assert codebooks.nf4() is codebooks.nf4()

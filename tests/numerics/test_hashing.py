"""Keys and random bits follow from numbers alone, as their sources write them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from loralab.numerics.hashing import counted, hashed, mix

WORD = 2**64


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4))
def test_a_key_fits_63_bits_and_depends_on_every_word(words):
    key = mix(*words)
    assert 0 <= key < 2**63
    assert mix(*words[:-1], words[-1] ^ 1) != key


def degskis(x):
    x ^= x >> 32
    for _ in range(2):
        x = x * 0xD6E8FEB86659FD93 % WORD
        x ^= x >> 32
    return x


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5))
def test_a_number_is_hashed_as_in_whole_numbers(numbers):
    found = hashed(torch.tensor(numbers))
    assert [number % WORD for number in found.tolist()] == [degskis(number % WORD) for number in numbers]


@pytest.fixture(scope="module")
def bits():
    """(2^15, 64), of numbers in a row."""
    words = counted(mix(7), torch.arange(2**15)).numpy().view(np.uint8).reshape(-1, 8)
    return np.unpackbits(words, axis=1, bitorder="little").astype(np.float32)


def test_every_bit_is_as_often_one_as_zero(bits):
    found = [stats.binomtest(int(ones), len(bits)).pvalue for ones in bits.sum(0)]
    assert min(found) > 1e-4, found


@pytest.mark.parametrize("apart", [0, 1, 2, 64])
def test_no_two_bits_of_a_number_or_its_neighbour_go_together(bits, apart):
    signs = 2 * bits - 1
    z = signs[: len(signs) - apart].T @ signs[apart:] / np.sqrt(len(signs) - apart)
    if not apart:
        np.fill_diagonal(z, 0)
    assert np.abs(z).max() < stats.norm.isf(1e-3 / z.size / 2)


@pytest.mark.parametrize("lane", range(4))
def test_sixteen_bits_are_uniform(lane):
    lanes = counted(mix(11), torch.arange(2**20)).view(torch.int16)[lane::4]
    counts = torch.bincount(lanes.long() + 2**15, minlength=2**16)
    assert 1e-3 < stats.chisquare(counts.numpy()).pvalue < 1 - 1e-3


def test_a_flipped_bit_of_the_number_flips_half_of_the_hash():
    numbers = counted(mix(3), torch.arange(2**12))  # any
    flipped = [hashed(numbers ^ (1 << bit if bit < 63 else -(2**63))) for bit in range(64)]
    changed = torch.stack([one ^ hashed(numbers.clone()) for one in flipped]).numpy().view(np.uint8).reshape(64, -1, 8)
    share = np.unpackbits(changed, axis=2, bitorder="little").mean(1)  # (bit of the number, bit of the hash)
    assert np.abs(share - 0.5).max() < 0.06

"""Random bits as a function of numbers, on the host and, many at once, on a device: no state, no generator."""

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, as splitmix64 counts
SPREAD = 0xD6E8FEB86659FD93  # by C. Degski's hash64


def mix(*words: int) -> int:
    """A 63-bit key from several words (splitmix64's finalizer), equal on every platform."""
    state = 0
    for word in words:
        state = (state + word + GOLDEN) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def hashed(x: Tensor) -> Tensor:
    """x, int64 and contiguous, each number replaced by the 64 random bits that follow from it (C. Degski's hash64,
    x ^= x >> 32 and x *= SPREAD in turns). Five operations, as a shift by half a word is a view."""
    halves = x.view(torch.int32)
    low, high = halves[..., 0::2], halves[..., 1::2]  # every machine that torch runs on is little-endian
    low.bitwise_xor_(high)
    for _ in range(2):
        x.mul_(_signed(SPREAD))
        low.bitwise_xor_(high)
    return x


def counted(key: Tensor | int, numbers: Tensor) -> Tensor:
    """64 random bits for each of ``numbers`` (int64) under a key of ``mix``'s, or under one each; on their device."""
    return hashed(numbers * _signed(GOLDEN) + key)


def _signed(word: int) -> int:
    """The int64 of the same bits."""
    return word - 2**64 if word >= 2**63 else word

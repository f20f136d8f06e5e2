"""Counter-based random bits: a word is a pure function of a key and a counter, on every device.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
written in int64 tensor arithmetic.
"""

import torch
from torch import Tensor

LOW32 = 0xFFFF_FFFF
_MULTIPLIERS = (0xD251_1F53, 0xCD9E_8D57)
_KEY_INCREMENTS = (0x9E37_79B9, 0xBB67_AE85)
_ROUNDS = 10


def _multiply_high_low(x: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    # A product of two 32-bit numbers overflows int64, so it is put together from halves.
    low_half, high_half = x & 0xFFFF, x >> 16
    low_product, high_product = low_half * multiplier, high_half * multiplier
    middle = high_product + (low_product >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low_product & 0xFFFF)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four 32-bit words for each 128-bit counter.

    Args:
        counter: four int64 tensors that broadcast, each in [0, 2**32).
        key: two integers in [0, 2**32).

    Returns:
        Four int64 tensors of the broadcast shape, each in [0, 2**32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply_high_low(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply_high_low(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & LOW32, (k1 + _KEY_INCREMENTS[1]) & LOW32
    return c0, c1, c2, c3

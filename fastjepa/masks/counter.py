"""Counter-based random numbers: a draw is a pure function of what it is for.

Masks, augmentations and the order of images are all functions of (seed, epoch, image
index, step). No generator is carried along, so nothing has to be saved, and neither the
number of workers nor the number of ranks can change what an image gets.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
written in int64 tensor arithmetic: the same bits on every device.
"""

from enum import IntEnum

import torch
from torch import Tensor

_LOW32 = 0xFFFF_FFFF
_MULTIPLIERS = (0xD251_1F53, 0xCD9E_8D57)
_KEY_INCREMENTS = (0x9E37_79B9, 0xBB67_AE85)
_ROUNDS = 10


class Stream(IntEnum):
    """What a draw is for: two streams never share a number."""

    BLOCK_SIZES = 0
    TARGET_PLACES = 1
    CONTEXT_PLACES = 2
    TARGET_TOKENS = 3
    CONTEXT_TOKENS = 4
    RANDOM_MASK = 5
    CROP = 6
    FLIP = 7
    IMAGE_ORDER = 8


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
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _LOW32, (k1 + _KEY_INCREMENTS[1]) & _LOW32
    return c0, c1, c2, c3


def random_words(
    seed: int, stream: Stream, index: Tensor, epoch: int, count: int, attempt: int = 0
) -> Tensor:
    """`count` 32-bit words for each index.

    Args:
        seed: any integer; its low 64 bits are the key.
        stream: what the draw is for.
        index: int64 [B], below 2**32: an image index, or a step.
        epoch: below 2**32.
        count: words per index, below 2**18.
        attempt: a further draw for the same purpose, below 2**12.

    Returns:
        int64 [B, count] in [0, 2**32), on the device of `index`.
    """
    blocks = torch.arange(-(-count // 4), device=index.device)  # [ceil(count / 4)]
    purpose = torch.tensor((int(stream) << 12) | attempt, device=index.device)
    words = philox(
        (blocks[None, :], index[:, None].long(), torch.tensor(epoch, device=index.device), purpose),
        (seed & _LOW32, (seed >> 32) & _LOW32),
    )
    return torch.stack(words, dim=-1).flatten(1)[:, :count]  # [B, count]


def uniform(seed: int, stream: Stream, index: Tensor, epoch: int, count: int, attempt: int = 0) -> Tensor:
    """As `random_words`, as float64 [B, count] in [0, 1)."""
    # In fp32 the largest words would round up to 1.
    return random_words(seed, stream, index, epoch, count, attempt).double() * 2.0**-32


def below(words: Tensor, bound: Tensor | int) -> Tensor:
    """Turn words into integers in [0, bound), by the high half of a 32 by 32-bit product.

    No bias above bound / 2**32. `bound` must be below 2**31.
    """
    return (words * bound) >> 32

"""Counter-based random numbers: a draw is a pure function of what it is for.

Masks, augmentations and the order of images are all functions of (seed, epoch, image
index, step). No generator is carried along, so nothing has to be saved, and neither the
number of workers nor the number of ranks can change what an image gets.

The generator is Philox, in int64 tensor arithmetic: the same bits on every device.
"""

from enum import IntEnum

import torch
from torch import Tensor

from fastjepa_kernels import choice
from fastjepa_kernels.checks import require, require_index_values
from fastjepa_kernels.choice import Way, Ways
from fastjepa_kernels.philox import LOW32, philox


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
    SHARD_ORDER = 9


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

    Raises:
        ValueError: the epoch, or on the CPU an index, is out of range.
    """
    key = (seed & LOW32, (seed >> 32) & LOW32)
    return _WAYS(choice.preference(), index.device, index.long(), key, int(stream), epoch, count, attempt)


def _reference(
    index: Tensor, key: tuple[int, int], stream: int, epoch: int, count: int, attempt: int
) -> Tensor:
    require_index_values("index", index, 1 << 32)
    require(0 <= epoch < 1 << 32, f"epoch must lie in 0..2**32-1, got {epoch}")
    blocks = torch.arange(-(-count // 4), device=index.device)  # [ceil(count / 4)]
    purpose = torch.tensor((stream << 12) | attempt, device=index.device)
    words = philox((blocks[None, :], index[:, None], torch.tensor(epoch, device=index.device), purpose), key)
    return torch.stack(words, dim=-1).flatten(1)[:, :count]  # [B, count]


def _native(index: Tensor, key: tuple[int, int], stream: int, epoch: int, count: int, attempt: int) -> Tensor:
    return torch.ops.fastjepa_native.random_words(index, key, stream, epoch, count, attempt)


_WAYS = Ways("random_words", Way("cpp", _native), Way("torch", _reference))


def uniform(seed: int, stream: Stream, index: Tensor, epoch: int, count: int, attempt: int = 0) -> Tensor:
    """As `random_words`, as float64 [B, count] in [0, 1)."""
    # In fp32 the largest words would round up to 1.
    return random_words(seed, stream, index, epoch, count, attempt).double() * 2.0**-32


def below(words: Tensor, bound: Tensor | int) -> Tensor:
    """Turn words into integers in [0, bound), by the high half of a 32 by 32-bit product.

    No bias above bound / 2**32. `bound` must be below 2**31.
    """
    return (words * bound) >> 32

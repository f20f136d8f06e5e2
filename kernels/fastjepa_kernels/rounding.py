"""Stochastic rounding of fp32 to bf16: up or down by chance, so that the mean is what was rounded.

bf16 is the upper half of fp32. A random number below 2**16 is added to the bits and the lower half cut
off: the carry comes with the probability that rounding up should have. The random bits are a function of
(seed, step, element of the named parameter), so that neither the order nor the cut of a shard matters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastjepa_kernels.language import tl, triton
from fastjepa_kernels.philox import LOW32, philox

_INFINITY = 0x7F80_0000
_LARGEST = 0x7F7F_FFFF
_QUIET = 0x0040_0000  # set in a NaN that must not become an infinity when its lower half is cut off
_PIECE = 1 << 20  # elements that are rounded together: the random words take 32 bytes each


@dataclass(frozen=True)
class StochasticRounding:
    """How an average in bf16 is rounded.

    Attributes:
        seed: any integer; its low 64 bits count.
        step: in [0, 2**32), a new one for each update; an int, or a 0-d int64 tensor on the device.
        parameters: of each tensor, the number of the named parameter that it is or is a piece of, in
            [0, 2**32); by default tensor i is of parameter i.
        offsets: of each tensor, the element of that parameter that it begins with; by default 0.
    """

    seed: int
    step: int | Tensor
    parameters: Sequence[int] | None = None
    offsets: Sequence[int] | None = None


def _random_bits(
    count: int, offset: int, parameter: int, rounding: StochasticRounding, device: torch.device
) -> Tensor:
    """int64 [count] in [0, 2**16), for elements offset to offset + count - 1 of a parameter."""
    groups = torch.arange(offset // 4, (offset + count + 3) // 4, device=device)  # a word for each of four
    step = torch.as_tensor(rounding.step, device=device) & LOW32
    words = philox(
        (groups & LOW32, groups >> 32, torch.tensor(parameter, device=device), step),
        (rounding.seed & LOW32, (rounding.seed >> 32) & LOW32),
    )
    return torch.stack(words, dim=-1).flatten()[offset % 4 :][:count] >> 16


def _to_bfloat16(value: Tensor, noise: Tensor) -> Tensor:
    """fp32 to bf16, up with a chance of the part cut off, for noise in [0, 2**16)."""
    bits = value.view(torch.int32)
    magnitude = bits & 0x7FFF_FFFF
    # What is finite stays finite.
    rounded = (magnitude + noise.int()).clamp(max=_LARGEST)
    rounded = torch.where(magnitude < _INFINITY, rounded, magnitude)
    rounded = torch.where(magnitude > _INFINITY, magnitude | _QUIET, rounded)
    return ((bits >> 16 & -0x8000) | (rounded >> 16)).to(torch.int16).view(torch.bfloat16)


def round_to_bfloat16(
    value: Tensor, rounding: StochasticRounding, parameter: int = 0, offset: int = 0
) -> Tensor:
    """Round elements offset, offset + 1, … of a parameter, in row-major order.

    Args:
        value: fp32 of any shape.
        rounding: its `seed` and `step`.
        parameter: in [0, 2**32).
        offset: 0 or more.

    Returns:
        bf16 of the same shape. Infinities and NaNs stay what they are, and finite numbers finite.
    """
    pieces = value.reshape(-1).split(_PIECE)
    rounded = [
        _to_bfloat16(
            piece,
            _random_bits(piece.numel(), offset + i * _PIECE, parameter, rounding, value.device),
        )
        for i, piece in enumerate(pieces)
    ]
    return torch.cat(rounded).view(value.shape)


@triton.jit
def random_bits(
    seed,  # int64
    step,  # int64
    parameter,  # int64
    first,  # int64, a multiple of 4: the element that the block begins with
    BLOCK: tl.constexpr,
):
    """int32 [BLOCK] in [0, 2**16), the same as `_random_bits`."""
    group = first // 4 + tl.arange(0, BLOCK // 4).to(tl.int64)  # [BLOCK / 4]
    low = group.to(tl.uint32)
    high = (group >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero + parameter.to(tl.uint32), zero + step.to(tl.uint32))
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))  # [BLOCK]
    return (words >> 16).to(tl.int32)


@triton.jit
def to_bfloat16_bits(
    value,  # fp32 [BLOCK]
    noise,  # int32 [BLOCK]
):
    """int16 [BLOCK], the same bits as `_to_bfloat16`."""
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    rounded = tl.minimum(magnitude + noise, 0x7F7FFFFF)
    rounded = tl.where(magnitude < 0x7F800000, rounded, magnitude)
    rounded = tl.where(magnitude > 0x7F800000, magnitude | 0x00400000, rounded)
    return (((bits >> 16) & -0x8000) | (rounded >> 16)).to(tl.int16)

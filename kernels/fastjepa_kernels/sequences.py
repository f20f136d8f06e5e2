"""Which sequence and which place in it each row of a packed stream has."""

import torch
from torch import Tensor

from fastjepa_kernels.language import tl, triton


def sequence_of_rows(cu_seqlens: Tensor, rows: int) -> Tensor:
    """int64 [rows]: the sequence that holds each row; rows past the end get the last one.

    Nothing here waits for the device: `rows` is known on the host.
    """
    row = torch.arange(rows, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    last = max(cu_seqlens.numel() - 2, 0)
    return (torch.searchsorted(cu_seqlens, row, right=True) - 1).clamp_(0, last)


def rows_in_sequences(cu_seqlens: Tensor, rows: int) -> Tensor:
    """bool [rows]: false for the rows past the end, which no sequence holds."""
    return torch.arange(rows, device=cu_seqlens.device) < cu_seqlens[-1]


@triton.jit
def image_of_row(cu_seqlens, row, images, STEPS: tl.constexpr):
    """For the inside of kernels: the last image whose rows start at or before `row`, by bisection.

    STEPS is images.bit_length(). Rows past the end get the last image.
    """
    low = row * 0
    high = low + images  # the answer is in low..high-1
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        starts_after = tl.load(cu_seqlens + middle) > row
        high = tl.where(starts_after, middle, high)
        low = tl.where(starts_after, low, middle)
    return low

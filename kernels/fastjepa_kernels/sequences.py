"""Which sequence and which place in it each row of a packed stream has."""

import torch
from torch import Tensor


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

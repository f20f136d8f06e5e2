"""Packed rows as a dense batch of the bound's length, and back, without waiting for the device."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fastjepa_kernels.sequences import rows_in_sequences, sequence_of_rows


@dataclass(frozen=True)
class Padding:
    """Where each row stands in a batch [S, L, ...], and which of the batch's places hold rows.

    Whatever cu_seqlens holds, every place is one of the batch and every row one of the stream: what nobody
    has checked on a GPU must not end its context.
    """

    row: Tensor  # int64 [S, L]: in the stream; any row for a place without one
    held: Tensor  # bool [S, L]
    place: Tensor  # int64 [T]: in the flat batch; any place for a row past the end
    valid: Tensor  # bool [T]

    @classmethod
    def of(cls, cu_seqlens: Tensor, tokens: int, length: int) -> Self:
        """`length` is at least that of the longest sequence."""
        inside = torch.arange(length, device=cu_seqlens.device)  # [L]
        sequence = sequence_of_rows(cu_seqlens, tokens)  # [T]
        valid = rows_in_sequences(cu_seqlens, tokens)  # [T]
        place = sequence * length + torch.arange(tokens, device=cu_seqlens.device) - cu_seqlens[sequence]
        return cls(
            row=(cu_seqlens[:-1, None] + inside).clamp_(0, tokens - 1),
            held=inside < cu_seqlens.diff()[:, None],
            place=torch.where(valid, place, 0).clamp_(0, (cu_seqlens.numel() - 1) * length - 1),
            valid=valid,
        )

    @property
    def keys(self) -> Tensor:
        """bool [S, 1, 1, L]: what is attended to. All of an empty sequence, lest a softmax be of nothing."""
        return (self.held | ~self.held.any(dim=1, keepdim=True))[:, None, None]

    def pad(self, rows: Tensor) -> Tensor:
        """[T, ...] to [S, L, ...], zero where there is no row."""
        batch = rows.index_select(0, self.row.flatten()).unflatten(0, self.row.shape)
        return batch.masked_fill_(~self.held.view(*self.held.shape, *[1] * (batch.ndim - 2)), 0)

    def unpad(self, batch: Tensor) -> Tensor:
        """[S, L, ...] to [T, ...], zero past the end."""
        rows = batch.flatten(0, 1).index_select(0, self.place)
        return rows.masked_fill_(~self.valid.view(-1, *[1] * (rows.ndim - 1)), 0)

"""The masks of a batch."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Masks:
    """Patch positions, row by row in the grid, ascending in every list.

    Attributes:
        context: int64 [B, K]; packed: [T], image b's at cu_seqlens[b] to cu_seqlens[b + 1].
        targets: int64 [M, B, P].
        cu_seqlens: int32 [B + 1] if packed, else None.
    """

    context: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> "Masks":
        cu_seqlens = self.cu_seqlens
        return Masks(
            self.context.to(device, non_blocking=non_blocking),
            self.targets.to(device, non_blocking=non_blocking),
            None if cu_seqlens is None else cu_seqlens.to(device, non_blocking=non_blocking),
        )


class MaskSampler(Protocol):
    """What draws masks: a pure function of the image, the epoch and the optimizer step."""

    def sample(self, image_index: Tensor, epoch: int = 0, step: int = 0) -> Masks: ...

"""The masks of a batch."""

from collections.abc import Callable
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
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Masks":
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Masks":
        cu_seqlens = None if self.cu_seqlens is None else change(self.cu_seqlens)
        return Masks(change(self.context), change(self.targets), cu_seqlens)


class MaskSampler(Protocol):
    """What draws masks: a pure function of the image, the epoch and the optimizer step."""

    def sample(self, image_index: Tensor, epoch: int = 0, step: int = 0) -> Masks: ...

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
        asked_rows: int64 [R], the rows of the stream of all images' patches that targets name; None if nobody
            looked for them.
        asked_places: int64 [M, B, P], where each target token is among asked_rows.
        longest: of packed contexts, a bound of their lengths that is known on the host; None for the grid.
    """

    context: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None = None
    asked_rows: Tensor | None = None
    asked_places: Tensor | None = None
    longest: int | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> "Masks":
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Masks":
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Masks":
        def changed(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        return Masks(
            change(self.context),
            change(self.targets),
            changed(self.cu_seqlens),
            changed(self.asked_rows),
            changed(self.asked_places),
            self.longest,
        )


class MaskSampler(Protocol):
    """What draws masks: a pure function of the image, the epoch and the optimizer step."""

    def sample(self, image_index: Tensor, epoch: int = 0, step: int = 0) -> Masks: ...

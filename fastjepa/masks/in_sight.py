"""How much of what is to be predicted a sampler leaves in sight."""

import torch

from fastjepa.masks.multiblock import MultiBlockMasks
from fastjepa.masks.types import Masks

_IMAGES, _STEPS = 64, 16


def share_in_sight(sampler: MultiBlockMasks) -> float:
    """Of 1,024 images, the share of target patches that the context shows as well: 0 where all are hidden.

    Where a context cannot be as long as it must be without them, targets are let go of, one after another.
    """
    images = torch.arange(_STEPS * _IMAGES).split(_IMAGES)
    patches = sampler.grid[0] * sampler.grid[1]
    shown = asked = 0
    for step, batch in enumerate(images):
        masks = sampler.sample(batch, 0, step)
        visible = _visible(masks, len(batch), patches)  # [B, N]
        shown += int(visible.expand(len(masks.targets), -1, -1).gather(2, masks.targets).sum())
        asked += masks.targets.numel()
    return shown / asked


def _visible(masks: Masks, images: int, patches: int) -> torch.Tensor:
    """Which patches each context shows: bool [B, N]."""
    if masks.cu_seqlens is None:
        image = torch.arange(images)[:, None].expand_as(masks.context)  # [B, K]
    else:
        image = torch.arange(images).repeat_interleave(masks.cu_seqlens.diff().long())  # [T]
    visible = torch.zeros(images, patches, dtype=torch.bool)
    visible[image, masks.context] = True
    return visible

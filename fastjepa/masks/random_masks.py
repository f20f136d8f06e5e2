"""Random masks: each image keeps a fixed number of patches, chosen uniformly (MAE, arXiv:2111.06377)."""

import torch
from torch import Tensor

from fastjepa.masks.counter import Stream, random_words
from fastjepa.masks.types import Masks


class RandomMasks:
    """Keep int((1 - mask_ratio) * N) patches of each image; the rest is the one target block.

    Args:
        grid: patches per column and per row.
        mask_ratio: the fraction hidden, in (0, 1).
        seed: the masks of an image are a function of (seed, epoch, image index) alone.
    """

    def __init__(self, grid: tuple[int, int], mask_ratio: float = 0.75, seed: int = 0) -> None:
        self.patches = grid[0] * grid[1]
        self.kept = int(self.patches * (1 - mask_ratio))
        self.seed = seed
        if not 0 < self.kept < self.patches:
            raise ValueError(
                f"mask_ratio {mask_ratio} on a grid of {grid[0]} x {grid[1]} keeps {self.kept} of "
                f"{self.patches} patches; at least one must be kept and one hidden"
            )

    def sample(self, image_index: Tensor, epoch: int = 0, step: int = 0) -> Masks:
        """Masks for the images at `image_index` [B]; `step` plays no part."""
        del step
        order = random_words(self.seed, Stream.RANDOM_MASK, image_index, epoch, self.patches).argsort(
            dim=1, stable=True
        )  # [B, N]
        context, hidden = order[:, : self.kept], order[:, self.kept :]
        return Masks(context.sort(dim=1).values, hidden.sort(dim=1).values[None])


def choose(words: Tensor, allowed: Tensor, count: int) -> Tensor:
    """An unbiased choice of `count` of the allowed places, ascending.

    Args:
        words: int64 [..., N] random words in [0, 2**32).
        allowed: bool [..., N], with at least `count` true in each row.

    Returns:
        int64 [..., count].
    """
    keys = torch.where(allowed, words, 1 << 32)  # what is not allowed sorts last
    return keys.argsort(dim=-1, stable=True)[..., :count].sort(dim=-1).values

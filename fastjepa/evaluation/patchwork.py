"""Images cut into patches and put together again, for pictures."""

import torch
import torch.nn.functional as F
from torch import Tensor

_OUTSIDE = 128  # grey, for what lies outside the image


def cut(images: Tensor, patch: int) -> Tensor:
    """[n, C, H, W] as patches [n, N, C, p, p], row by row in the grid."""
    n, channels, height, width = images.shape
    cells = images.reshape(n, channels, height // patch, patch, width // patch, patch)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(n, -1, channels, patch, patch)


def join(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """The images [n, C, H, W] that `cut` into patches [n, N, C, p, p]."""
    n, _, channels, patch, _ = patches.shape
    cells = patches.reshape(n, *grid, channels, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(n, channels, grid[0] * patch, grid[1] * patch)


def shrink(images: Tensor, side: int) -> Tensor:
    """uint8 [..., C, H, W], H = W, as [..., C, side, side], the mean of the pixels under each; no larger."""
    if images.shape[-1] <= side:
        return images
    flat = images.reshape(-1, *images.shape[-3:]).float()
    small = F.adaptive_avg_pool2d(flat, side).round().to(torch.uint8)
    return small.view(*images.shape[:-2], side, side)


def fill(patches: Tensor, places: Tensor, found: Tensor) -> Tensor:
    """Other patches in the place of some; where blocks overlap, the first of them counts.

    Args:
        patches: [n, N, C, p, p].
        places: int64 [M, n, P].
        found: [M, n, P, C, p, p].

    Returns:
        [n, N, C, p, p].
    """
    filled = patches.clone()
    image = torch.arange(len(patches), device=patches.device)[:, None]  # [n, 1]
    for block, pixels in zip(places.flip(0), found.flip(0), strict=True):
        filled[image, block] = pixels
    return filled


def surroundings(image: Tensor, place: int, patch: int, around: int = 1) -> Tensor:
    """One patch of [C, H, W] and the patches around it: [C, q, q], q = (1 + 2 around) p. Grey is outside."""
    margin = around * patch
    row, column = divmod(place, image.shape[2] // patch)
    padded = F.pad(image, (margin,) * 4, value=_OUTSIDE)
    side = patch + 2 * margin
    return padded[:, row * patch : row * patch + side, column * patch : column * patch + side]

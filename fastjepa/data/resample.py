"""Crops resized by matrix products, a batch at a time, on any device.

A separable filter is a matrix on each axis: view = V @ crop @ Hᵀ, of which V and H, [size, pixels], hold
a few weights that are not zero in each row. They are the bicubic ones (Keys, 1981, a = -1/2), stretched
where pixels become fewer, so that nothing aliases, and the result is rounded to 8 bits after each axis: what
Pillow does, and so the same view to within one of 255 levels (of images far taller than wide Pillow takes the
height first, and clips other values on the way). `grid_sample` has no filter that stretches.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from fastjepa.data.transforms import Corners, reduce, to_tensor

_SUPPORT = 2  # of the bicubic filter, in pixels of the view, or of the crop where those are larger


class Part(NamedTuple):
    """Pixels that a resize reads, and what it is to show of them.

    pixels: uint8 [C, h, w].
    corners: in these pixels.
    """

    pixels: Tensor
    corners: Corners
    flip: bool


@dataclass(frozen=True)
class Resampling:
    """What is still to be done with a batch of crops, padded to one height and width.

    Attributes:
        corners: float64 [B, 4], left, top, right, bottom of what a view shows.
        extents: int64 [B, 2], height and width of a crop without what pads it.
        flip: bool [B], mirrored.
        size: of the views.
    """

    corners: Tensor
    extents: Tensor
    flip: Tensor
    size: int

    def to(self, device: torch.device) -> "Resampling":
        return Resampling(
            self.corners.to(device, non_blocking=True),
            self.extents.to(device, non_blocking=True),
            self.flip.to(device, non_blocking=True),
            self.size,
        )

    def pin_memory(self) -> "Resampling":
        return Resampling(
            self.corners.pin_memory(), self.extents.pin_memory(), self.flip.pin_memory(), self.size
        )

    def __call__(self, crops: Tensor) -> Tensor:
        """Views, uint8 [B, C, size, size].

        Args:
            crops: uint8 [B, C, H, W], on the device of `corners`; what pads them does not matter.
        """
        left, top, right, bottom = self.corners.unbind(1)  # [B] each
        height, width = self.extents.unbind(1)
        across = bicubic_weights(left, right, width, crops.shape[3], self.size)  # [B, size, W]
        across = torch.where(self.flip[:, None, None], across.flip(1), across)
        down = bicubic_weights(top, bottom, height, crops.shape[2], self.size)  # [B, size, H]
        rows = _to_8_bits(torch.einsum("bchw,bsw->bchs", crops.float(), across))  # [B, C, H, size]
        views = _to_8_bits(torch.einsum("bchs,bth->bcts", rows, down))  # [B, C, size, size]
        return views.to(torch.uint8)


def _to_8_bits(values: Tensor) -> Tensor:
    return values.add_(0.5).floor_().clamp_(0, 255)


def bicubic_weights(begin: Tensor, end: Tensor, extent: Tensor, length: int, size: int) -> Tensor:
    """The weights by which `size` pixels of a view sum `length` of a crop, along one axis.

    Args:
        begin, end: float64 [B], what the view shows, in pixels of the crop.
        extent: int64 [B], pixels of the crop that count, at most `length`.
        length: of the crop, with what pads it.
        size: of the view.

    Returns:
        fp32 [B, size, length], each row of sum 1.
    """
    stretch = ((end - begin) / size)[:, None, None]  # [B, 1, 1], pixels of the crop for each of the view
    places = torch.arange(size, device=begin.device)[None, :, None]  # [1, size, 1]
    centers = begin[:, None, None] + (places + 0.5) * stretch  # [B, size, 1]
    pixels = torch.arange(length, device=begin.device)[None, None, :]  # [1, 1, length]
    # Pillow takes whole pixels whose centre is within the filter to half a pixel.
    width = stretch.clamp(min=1)
    seen = (pixels >= (centers - _SUPPORT * width + 0.5).floor()) & (
        pixels < (centers + _SUPPORT * width + 0.5).floor()
    )
    seen &= pixels < extent[:, None, None]
    weights = torch.where(seen, _bicubic((pixels - centers + 0.5) / width), 0)
    return (weights / weights.sum(2, keepdim=True)).float()


def _bicubic(x: Tensor) -> Tensor:
    """Keys' kernel with a = -1/2."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


def part_of(image: Image.Image, corners: Corners, size: int, flip: bool) -> Part:
    """What a resize to `size` x `size` reads of an image, and no more."""
    image, corners = reduce(image, corners, size)
    return cut_part(to_tensor(image), corners, size, flip)


def cut_part(pixels: Tensor, corners: Corners, size: int, flip: bool) -> Part:
    """As `part_of`, of uint8 [C, H, W]."""
    margin_x = _SUPPORT * max(1, (corners.right - corners.left) / size) + 1
    margin_y = _SUPPORT * max(1, (corners.bottom - corners.top) / size) + 1
    left, top = max(0, math.floor(corners.left - margin_x)), max(0, math.floor(corners.top - margin_y))
    right, bottom = math.ceil(corners.right + margin_x), math.ceil(corners.bottom + margin_y)
    moved = Corners(corners.left - left, corners.top - top, corners.right - left, corners.bottom - top)
    return Part(pixels[:, top:bottom, left:right], moved, flip)


def collate(parts: list[Part], size: int) -> tuple[Tensor, Resampling]:
    """Crops side by side, padded: uint8 [B, C, H, W], and what is still to be done with them."""
    extents = torch.tensor([part.pixels.shape[1:] for part in parts])  # [B, 2]
    height, width = extents.amax(0).tolist()
    crops = torch.empty(len(parts), parts[0].pixels.shape[0], height, width, dtype=torch.uint8)
    for row, part in enumerate(parts):
        crops[row, :, : part.pixels.shape[1], : part.pixels.shape[2]] = part.pixels
    corners = torch.tensor([part.corners for part in parts], dtype=torch.float64)  # [B, 4]
    return crops, Resampling(corners, extents, torch.tensor([part.flip for part in parts]), size)

"""What part of an image a view shows, and its pixels. Pure functions; all chance comes from the counter."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastjepa.masks.counter import Stream, uniform

_CROP_TRIES = 10
_CROP_NUMBERS = 2 * _CROP_TRIES + 2
_REDUCING_GAP = 3


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


class Corners(NamedTuple):
    """Of a part of an image, in pixels, or between them. Fields in the order in which Pillow takes them."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Augmentation:
    """What varies from one epoch to the next. The default is nothing.

    Args:
        crop_scale: a random crop covers a fraction of the area uniform in this range; None takes
            the central square.
        crop_ratio: its width / height, log-uniform in this range.
        flip_probability: of a mirror image.

    Raises:
        ValueError: a range that is empty or out of bounds.
    """

    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_probability: float = 0.0

    def __post_init__(self) -> None:
        scale, ratio = self.crop_scale, self.crop_ratio
        if scale is not None and not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(
                f"crop_scale is {scale}; it must be two fractions of the area, 0 < low <= high <= 1"
            )
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"crop_ratio is {ratio}; it must be two ratios, 0 < low <= high")
        if not 0 <= self.flip_probability <= 1:
            raise ValueError(f"flip_probability is {self.flip_probability}; it must be from 0 to 1")

    @property
    def nothing(self) -> bool:
        return self.crop_scale is None and self.flip_probability == 0


UNCHANGED = Augmentation()


class Chance(NamedTuple):
    """What chance says about one image in one epoch."""

    crop: list[float]  # 22 numbers in [0, 1), which `crop_box` turns into a box; empty without a crop
    flip: bool


def draw(augmentation: Augmentation, seed: int, epoch: int, image_index: Tensor) -> list[Chance]:
    """The chances of the images at image_index, int64 [B]: B of them.

    Drawn for a whole batch at once, for the counter's cost is that of a few hundred small tensor
    operations, whatever their length.
    """
    crops: list[list[float]] = [[]] * len(image_index)
    flips = [False] * len(image_index)
    if augmentation.crop_scale is not None:
        crops = uniform(seed, Stream.CROP, image_index, epoch, _CROP_NUMBERS).tolist()  # [B, 22]
    if augmentation.flip_probability:
        uniforms = uniform(seed, Stream.FLIP, image_index, epoch, 1)[:, 0]  # [B]
        flips = (uniforms < augmentation.flip_probability).tolist()
    return [Chance(crop, flip) for crop, flip in zip(crops, flips, strict=True)]


def choose_box(height: int, width: int, augmentation: Augmentation, chance: Chance) -> Box:
    """The part of an image of this size that its chance gives. Without a crop, the central square."""
    if augmentation.crop_scale is None:
        return center_box(height, width)
    return crop_box(height, width, augmentation.crop_scale, augmentation.crop_ratio, chance.crop)


def augment(image: Image.Image, size: int, augmentation: Augmentation, chance: Chance) -> Tensor:
    """The view of an image that its chance gives: uint8 [C, size, size]."""
    box = choose_box(image.height, image.width, augmentation, chance)
    return view(image, corners_of(box), size, chance.flip)


def crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], numbers: Sequence[float]
) -> Box:
    """A random crop, of the distribution of torchvision's RandomResizedCrop (Inception crops).

    The first of ten tries that fits; if none does, the largest central box with a ratio in range.

    Args:
        height, width: of the image, in pixels.
        scale: range of the fraction of the area, uniform.
        ratio: range of width / height, log-uniform.
        numbers: 22 in [0, 1): two for each try, two for the place.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(_CROP_TRIES):
        area = height * width * (scale[0] + numbers[2 * attempt] * (scale[1] - scale[0]))
        aspect = math.exp(low + numbers[2 * attempt + 1] * (high - low))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(numbers[-2] * (height - crop_height + 1))
            left = int(numbers[-1] * (width - crop_width + 1))
            return Box(top, left, crop_height, crop_width)
    crop_width = max(1, min(width, round(height * ratio[1])))
    crop_height = max(1, min(height, round(width / ratio[0])))
    return Box((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


def center_box(height: int, width: int) -> Box:
    """The largest central square: what resizing the shorter side and cropping the centre leaves."""
    side = min(height, width)
    return Box((height - side) // 2, (width - side) // 2, side, side)


def corners_of(box: Box) -> Corners:
    return Corners(box.left, box.top, box.left + box.width, box.top + box.height)


def view(image: Image.Image, corners: Corners, size: int, flip: bool) -> Tensor:
    """The pixels of a part of an image, resized bicubically with antialiasing.

    At the edges of the part the filter sees the pixels beyond it, where the image has any. A part many
    times as large as its view is first reduced by means of whole pixels (see `reduce`).

    Returns:
        uint8 [C, size, size].
    """
    image, corners = reduce(image, corners, size)
    resized = image.resize((size, size), Image.Resampling.BICUBIC, box=corners)
    if flip:
        resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return to_tensor(resized)


def reduce(image: Image.Image, corners: Corners, size: int) -> tuple[Image.Image, Corners]:
    """The same part with fewer pixels, where it has six or more for each pixel of a view on an axis.

    Means of 2 x 2 pixels or more, at least three of which are left for each of the view's: what Pillow calls
    a reducing gap of 3, no different to the eye from the filter over all of them.
    """
    factors = (
        max(1, int((corners.right - corners.left) / size / _REDUCING_GAP)),
        max(1, int((corners.bottom - corners.top) / size / _REDUCING_GAP)),
    )
    if factors == (1, 1):
        return image, corners
    (across, down), margin = factors, 2 * _REDUCING_GAP
    # Whole blocks of pixels, and a few more than the part for the filter to see.
    left = max(0, math.floor(corners.left / across) - margin) * across
    top = max(0, math.floor(corners.top / down) - margin) * down
    right = min(image.width, (math.ceil(corners.right / across) + margin) * across)
    bottom = min(image.height, (math.ceil(corners.bottom / down) + margin) * down)
    reduced = image.reduce(factors, (left, top, right, bottom))
    return reduced, Corners(
        (corners.left - left) / across,
        (corners.top - top) / down,
        min(reduced.width, (corners.right - left) / across),
        min(reduced.height, (corners.bottom - top) / down),
    )


def to_tensor(image: Image.Image) -> Tensor:
    """uint8 [C, H, W] of an image of mode "RGB" or "L"."""
    pixels = torch.from_numpy(np.array(image))  # [H, W, C], or [H, W] if grey
    return pixels.view(image.height, image.width, -1).permute(2, 0, 1)

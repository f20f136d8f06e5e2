"""Views: the pixels of a batch of images, of any set, at one size."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from fastjepa.data.transforms import UNCHANGED, Augmentation, augment, draw
from fastjepa.data.unreadable import UnreadableImage, tolerated, too_many
from fastjepa.data.workers import note


class ImageSet(Protocol):
    """Images by number. What training and evaluation ask of a data set, whatever it is kept in."""

    @property
    def images(self) -> Tensor | None: ...  # uint8 [N, C, H, W] where all are in memory
    @property
    def labels(self) -> Tensor | None: ...  # int64 [N]
    @property
    def class_names(self) -> Sequence[str] | None: ...
    @property
    def channels(self) -> int: ...
    def __len__(self) -> int: ...
    def path(self, index: int) -> str: ...
    def read(self, index: int, min_side: int | None = None) -> Image.Image: ...  # or UnreadableImage


class Views(NamedTuple):
    """uint8 [B, C, size, size]; int64 [B], the images shown; path -> reason of those that could not be."""

    pixels: Tensor
    image_index: Tensor
    unreadable: dict[str, str]


def read_views(
    images: ImageSet,
    image_index: Sequence[int],
    size: int,
    augmentation: Augmentation = UNCHANGED,
    seed: int = 0,
    epoch: int = 0,
) -> Views:
    """One view of each image.

    In the place of an image that cannot be read stands the next in the set that can. What an
    image looks like depends on (seed, epoch, image) alone.

    Raises:
        TooManyUnreadable: more images in a row are unreadable than a run may skip at all.
    """
    index = torch.tensor(image_index)
    kept = images.images
    if kept is not None and augmentation.nothing and kept.shape[-2:] == (size, size):
        return Views(kept[index], index, {})

    pixels = torch.empty(len(index), images.channels, size, size, dtype=torch.uint8)
    unreadable: dict[str, str] = {}
    min_side = augmentation.min_side(size)
    chances = draw(augmentation, seed, epoch, index)
    for row, wanted in enumerate(image_index):
        found, image = _read_from(images, wanted, min_side, unreadable)
        if found != wanted:
            index[row] = found
            chances[row] = draw(augmentation, seed, epoch, index[row : row + 1])[0]
        pixels[row] = augment(image, size, augmentation, chances[row])
    return Views(pixels, index, unreadable)


def _read_from(
    images: ImageSet, wanted: int, min_side: int, unreadable: dict[str, str]
) -> tuple[int, Image.Image]:
    """The first readable image from `wanted` on; those before it are added to `unreadable`."""
    failed: dict[str, str] = {}
    for offset in range(min(len(images), tolerated(len(images), len(images)) + 1)):
        index = (wanted + offset) % len(images)
        note(index)
        try:
            image = images.read(index, min_side)
        except UnreadableImage as error:
            failed[error.path] = error.reason
            continue
        unreadable |= failed
        return index, image
    raise too_many(failed, tried=len(failed))

"""Views: the pixels of a batch of images, of any set, at one size."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from fastjepa.data.decoders import Decoder, read_part, read_view
from fastjepa.data.resample import Part, Resampling, collate, part_of
from fastjepa.data.transforms import UNCHANGED, Augmentation, Chance, augment, choose_box, corners_of, draw
from fastjepa.data.unreadable import MAX_BAD_FRACTION, UnreadableImage, tolerated, too_many
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
    def encoded(self, index: int) -> bytes | None: ...  # of its file, or UnreadableImage; None in memory


@dataclass(frozen=True)
class Reading:
    """How images become views; of all this only bad images change what is seen, beyond a level or so.

    Attributes:
        decoder: see `decoders`.
        augment: cpu: resized here; device: only cut out, to be resized where the batch goes.
        max_bad_fraction: of the images, how many may be unreadable; see `tolerated`.
    """

    decoder: Decoder = "pillow"
    augment: Literal["cpu", "device"] = "cpu"
    max_bad_fraction: float = MAX_BAD_FRACTION


DEFAULT = Reading()


class Views(NamedTuple):
    """uint8 [B, C, size, size]; int64 [B], the images shown; path -> reason of those that could not be.

    With a `resampling`, pixels are crops [B, C, H, W], and it makes the views of them.
    """

    pixels: Tensor
    image_index: Tensor
    unreadable: dict[str, str]
    resampling: Resampling | None = None


def read_views(
    images: ImageSet,
    image_index: Sequence[int],
    size: int,
    augmentation: Augmentation = UNCHANGED,
    seed: int = 0,
    epoch: int = 0,
    reading: Reading = DEFAULT,
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

    unreadable: dict[str, str] = {}
    chances = draw(augmentation, seed, epoch, index)
    views = torch.empty(len(index), images.channels, size, size, dtype=torch.uint8)
    parts: list[Part] = []
    for row, wanted in enumerate(image_index):
        failed: dict[str, str] = {}
        for found in _from(wanted, images, reading):
            note(found)
            if found != wanted:
                index[row] = found
                chances[row] = draw(augmentation, seed, epoch, index[row : row + 1])[0]
            try:
                if reading.augment == "device":
                    parts.append(_part(images, found, size, augmentation, chances[row], reading))
                else:
                    views[row] = _view(images, found, size, augmentation, chances[row], reading)
                break
            except UnreadableImage as error:
                failed[error.path] = error.reason
        else:
            raise too_many(failed, len(failed), reading.max_bad_fraction)
        unreadable |= failed
    if parts:
        crops, resampling = collate(parts, size)
        return Views(crops, index, unreadable, resampling)
    return Views(views, index, unreadable)


def _from(wanted: int, images: ImageSet, reading: Reading) -> Iterator[int]:
    """The image, and those after it that may take its place."""
    most = tolerated(len(images), len(images), reading.max_bad_fraction) + 1
    return ((wanted + offset) % len(images) for offset in range(min(len(images), most)))


def _view(
    images: ImageSet, index: int, size: int, augmentation: Augmentation, chance: Chance, reading: Reading
) -> Tensor:
    """uint8 [C, size, size]."""
    content = images.encoded(index)
    if content is None:
        return augment(images.read(index), size, augmentation, chance)
    choose = partial(choose_box, augmentation=augmentation, chance=chance)
    path = images.path(index)
    return read_view(content, path, images.channels, size, choose, chance.flip, reading.decoder)


def _part(
    images: ImageSet, index: int, size: int, augmentation: Augmentation, chance: Chance, reading: Reading
) -> Part:
    content = images.encoded(index)
    if content is None:
        image = images.read(index)
        box = choose_box(image.height, image.width, augmentation, chance)
        return part_of(image, corners_of(box), size, chance.flip)
    choose = partial(choose_box, augmentation=augmentation, chance=chance)
    path = images.path(index)
    return read_part(content, path, images.channels, size, choose, chance.flip, reading.decoder)

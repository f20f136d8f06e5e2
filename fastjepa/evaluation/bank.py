"""Images to look something up in: their pixels and what an encoder says of their patches."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastjepa.data.views import ImageSet, read_views

BANK_IMAGES = 512
_MOST_PATCHES = 1 << 16  # of all images: 170 MB of ViT-H's tokens in fp16
_AT_ONCE = 64  # images in one forward pass


@dataclass(frozen=True)
class Bank:
    """Attributes:
    images: uint8 [b, C, H, W], on the host.
    labels: int64 [b]; None without.
    tokens: fp16 [b, N, D], of their patches.
    """

    images: Tensor
    labels: Tensor | None
    tokens: Tensor

    def mean_tokens(self) -> Tensor:
        """The mean of each place over the images, fp32 [N, D]."""
        total = sum(part.float().sum(dim=0) for part in self.tokens.split(_AT_ONCE))
        assert isinstance(total, Tensor), "a bank has images"
        return total / len(self.tokens)

    def pooled(self) -> Tensor:
        """The mean over the places of each image, fp32 [b, D]."""
        return torch.cat([part.float().mean(dim=1) for part in self.tokens.split(_AT_ONCE)])


def read_bank(
    images: ImageSet,
    size: int,
    patches: int,
    encode: Callable[[Tensor], Tensor],
    without: frozenset[int] = frozenset(),
) -> Bank:
    """A bank of up to 512 images, spread evenly over the set: the same ones each time.

    Args:
        images: the set; labels are taken along for captions and play no part.
        size: of the views, in pixels.
        patches: of an image, which bounds how many are taken.
        encode: uint8 images [b, C, H, W] -> [b, N, D], any float type.
        without: numbers of images that must not be in it.

    Raises:
        ValueError: no image is left.
    """
    count = max(1, min(BANK_IMAGES, _MOST_PATCHES // patches, len(images)))
    wanted = (torch.arange(count) * len(images) // count).tolist()
    pixels, tokens, index = [], [], []
    seen = set(without)
    for first in range(0, count, _AT_ONCE):
        views = read_views(images, wanted[first : first + _AT_ONCE], size)
        # In the place of an unreadable image stands another, perhaps one that is there already.
        fresh = [row for row, number in enumerate(views.image_index.tolist()) if not _has(seen, number)]
        if fresh:
            pixels.append(views.pixels[fresh])
            index.append(views.image_index[fresh])
            tokens.append(encode(pixels[-1]).half())
    if not pixels:
        raise ValueError(f"a set of {len(images)} images has none besides those that are shown")
    labels = None if images.labels is None else images.labels[torch.cat(index)]
    return Bank(torch.cat(pixels), labels, torch.cat(tokens))


def _has(seen: set[int], number: int) -> bool:
    """Whether it is in the set, in which it is from now on."""
    was = number in seen
    seen.add(number)
    return was

"""Images to look something up in: their pixels and what an encoder says of their patches."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from fastjepa.data.views import ImageSet, Views, read_views
from fastjepa.data.workers import NotWanted, in_order

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


@dataclass(frozen=True)
class Reader:
    """How the images are read.

    Attributes:
        workers: processes that do it; 0 reads here.
        worker_timeout_s: how long to wait for one of them.
        should_stop: asked at every batch, and once a second while a worker's is waited for.
    """

    workers: int = 0
    worker_timeout_s: float = 300
    should_stop: Callable[[], bool] = lambda: False

    def read(self, images: ImageSet, chosen: Tensor, size: int) -> Iterator[Views]:
        """The images of the numbers int64 [b], a batch after the other.

        Raises:
            NotWanted: while reading, `should_stop` said so.
            TimeoutError: while reading, a worker hangs.
        """
        batches = in_order(
            _Read(images, size),
            (part.tolist() for part in chosen.split(_AT_ONCE)),
            workers=self.workers,
            describe=images.path,
            timeout_s=self.worker_timeout_s,
            should_stop=self.should_stop,
        )
        with closing(batches):
            for views in batches:
                if self.should_stop():
                    raise NotWanted
                yield views


@dataclass(frozen=True)
class _Read:
    images: ImageSet
    size: int

    def __call__(self, image_index: list[int]) -> Views:
        return read_views(self.images, image_index, self.size)


def read_bank(
    images: ImageSet,
    size: int,
    patches: int,
    encode: Callable[[Tensor], Tensor],
    without: frozenset[int] = frozenset(),
    reader: Reader | None = None,
) -> Bank:
    """A bank of up to 512 images, spread evenly over the set: the same ones each time.

    Args:
        images: the set; labels are taken along for captions and play no part.
        size: of the views, in pixels.
        patches: of an image, which bounds how many are taken.
        encode: uint8 images [b, C, H, W] -> [b, N, D], any float type.
        without: numbers of images that must not be in it.
        reader: reads them; by default here.

    Raises:
        ValueError: no image is left.
        NotWanted, TimeoutError: see `Reader`.
    """
    count = max(1, min(BANK_IMAGES, _MOST_PATCHES // patches, len(images)))
    wanted = torch.arange(count) * len(images) // count  # [count]
    pixels, tokens, index = [], [], []
    seen = set(without)
    for views in (reader or Reader()).read(images, wanted, size):
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

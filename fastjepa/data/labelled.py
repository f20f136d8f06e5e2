"""Labelled images for evaluation: no chance in them, and no image in the place of another."""

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from fastjepa.data.unreadable import MAX_BAD_FRACTION, UnreadableCounter
from fastjepa.data.views import ImageSet, Reading, Views, read_views
from fastjepa.data.workers import NotWanted, in_order


@dataclass(frozen=True)
class _ReadBatch:
    images: ImageSet
    size: int
    reading: Reading

    def __call__(self, image_index: list[int]) -> Views:
        views = read_views(self.images, image_index, self.size, reading=self.reading)
        itself = views.image_index == torch.tensor(image_index)  # False where it cannot be read
        return Views(views.pixels[itself], views.image_index[itself], views.unreadable)


def evaluation_batches(
    images: ImageSet,
    size: int,
    batch_size: int,
    *,
    limit: int | None = None,
    workers: int = 0,
    worker_timeout_s: float = 300,
    should_stop: Callable[[], bool] = lambda: False,
    max_bad_fraction: float = MAX_BAD_FRACTION,
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """The central square of every image, once, in the order of the set, with its label.

    Images that cannot be read are left out, and named in a warning.

    Args:
        images: a set with labels.
        size: of the views, in pixels.
        batch_size: images at a time; the last batch may be smaller.
        limit: take this many images, spread evenly over the set, so that one sorted by class gives
            of every class.
        workers: processes that read; 0 reads here.
        worker_timeout_s: how long to wait for a batch before a worker is taken to hang.
        should_stop: asked at every batch, and once a second while a worker's is waited for.
        max_bad_fraction: of the images, how many may be unreadable; see `tolerated`.

    Returns:
        An iterator over pairs of uint8 [B, C, size, size] and int64 [B].

    Raises:
        ValueError: the set has no labels.
        TooManyUnreadable: while reading, more of the images cannot be read than that.
        NotWanted: while reading, `should_stop` said so.
        TimeoutError: while reading, a worker hangs.
    """
    labels = images.labels
    if labels is None:
        raise ValueError("these images have no labels; evaluation needs them: one sub-folder for each class")
    count = len(images) if limit is None else min(limit, len(images))
    chosen = torch.arange(count) * len(images) // count  # [count]
    batches = in_order(
        _ReadBatch(images, size, Reading(max_bad_fraction=max_bad_fraction)),
        (part.tolist() for part in chosen.split(batch_size)),
        workers=workers,
        describe=images.path,
        timeout_s=worker_timeout_s,
        should_stop=should_stop,
    )

    def labelled() -> Generator[tuple[Tensor, Tensor], None, None]:
        counter = UnreadableCounter(len(images), max_bad_fraction)
        with closing(batches):
            for views in batches:
                if should_stop():
                    raise NotWanted
                counter.update(views.image_index, views.unreadable)
                if len(views.image_index):
                    yield views.pixels, labels[views.image_index]

    return labelled()

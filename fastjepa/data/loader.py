"""Batches: pixels of the images whose turn it is, and the masks that go with them."""

import itertools
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastjepa.data.order import GlobalOrder, rank_slice
from fastjepa.data.resample import Resampling
from fastjepa.data.transforms import Augmentation
from fastjepa.data.unreadable import UnreadableCounter
from fastjepa.data.views import DEFAULT, ImageSet, Reading, read_views
from fastjepa.data.workers import in_order
from fastjepa.masks import Masks, MaskSampler


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        images: uint8 [B, C, H, W]. With a `resampling`, crops that `to` makes views of.
        image_index: int64 [B], their numbers in the set.
        masks: for these images at this epoch and step.
        epoch: from 0.
        step: the optimizer step, from 0.
        unreadable: path -> reason, of images whose place was given to the next readable one.
        resampling: what is left to be done on the device.
    """

    images: Tensor
    image_index: Tensor
    masks: Masks
    epoch: int
    step: int
    unreadable: dict[str, str]
    resampling: Resampling | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """Pixels and masks on a device; from pinned memory without waiting for the copy."""
        device = torch.device(device)
        images = self.images.to(device, non_blocking=True)
        if self.resampling is not None:
            images = self.resampling.to(device)(images)
        return replace(self, images=images, masks=self.masks.to(device, non_blocking=True), resampling=None)

    def pin_memory(self) -> "Batch":
        return replace(
            self,
            images=self.images.pin_memory(),
            masks=self.masks.pin_memory(),
            resampling=None if self.resampling is None else self.resampling.pin_memory(),
        )


class _Turn(NamedTuple):
    """The images of one micro-batch; as plain numbers, which cross to a worker most cheaply."""

    step: int
    epoch: int
    image_index: list[int]


@dataclass(frozen=True)
class _ReadBatch:
    images: ImageSet
    masks: MaskSampler
    size: int
    augmentation: Augmentation
    seed: int
    reading: Reading

    def __call__(self, turn: _Turn) -> Batch:
        step, epoch, index = turn
        views = read_views(self.images, index, self.size, self.augmentation, self.seed, epoch, self.reading)
        masks = self.masks.sample(views.image_index, epoch=epoch, step=step)
        return Batch(views.pixels, views.image_index, masks, epoch, step, views.unreadable, views.resampling)


def make_loader(
    images: ImageSet,
    masks: MaskSampler,
    order: GlobalOrder,
    *,
    size: int,
    augmentation: Augmentation,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    accumulation: int = 1,
    first_step: int = 0,
    last_step: int | None = None,
    workers: int = 0,
    worker_timeout_s: float = 300,
    should_stop: Callable[[], bool] = lambda: False,
    pin_memory: bool = False,
    reading: Reading = DEFAULT,
) -> Generator[Batch, None, None]:
    """A rank's micro-batches, `accumulation` for each step, across epochs.

    What is in them depends on neither `workers` nor where `first_step` resumes, and the images of
    a step taken together not on `world_size` or `accumulation`. Close it (`.close()`) to end the
    workers at once.

    Args:
        size: views are uint8 [C, size, size].
        seed: of the augmentation; crops are a function of (seed, epoch, image).
        first_step: images seen // global batch.
        last_step: the step to stop before; None never stops.
        workers: processes that read; 0 reads here.
        worker_timeout_s: how long to wait for a batch before a worker is taken to hang.
        should_stop: asked once a second while a worker's batch is waited for.
        pin_memory: hand out batches in pinned memory, for a GPU.
        reading: by which decoder, where crops are resized, how many images may be unreadable.

    Raises:
        ValueError: `order` is of another number of images, or its global batch does not divide.
        TooManyUnreadable: while reading, more of the images tried cannot be read than `reading` lets pass.
        NotWanted: while reading, `should_stop` said so.
        TimeoutError: while reading, a worker hangs.
        WorkersDied: while reading, workers are killed again and again.
    """
    if order.images != len(images):
        raise ValueError(f"the order is of {order.images} images, the set has {len(images)}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}; ranks are 0 to {world_size - 1}")
    # A batch that does not divide is refused now, not when the first one is asked for.
    rank_slice(torch.arange(order.global_batch), rank, world_size, accumulation)

    def turns() -> Iterator[_Turn]:
        steps = itertools.count(first_step) if last_step is None else range(first_step, last_step)
        for step in steps:
            epoch, indices = order.batch(step)
            for micro_batch in rank_slice(indices, rank, world_size, accumulation):
                yield _Turn(step, epoch, micro_batch.tolist())

    batches = in_order(
        _ReadBatch(images, masks, size, augmentation, seed, reading),
        turns(),
        workers=workers,
        describe=images.path,
        timeout_s=worker_timeout_s,
        should_stop=should_stop,
        pin_memory=pin_memory,
    )
    return _watched(batches, UnreadableCounter(len(images), reading.max_bad_fraction))


def _watched(
    batches: Generator[Batch, None, None], counter: UnreadableCounter
) -> Generator[Batch, None, None]:
    with closing(batches):
        for batch in batches:
            counter.update(batch.image_index, batch.unreadable)
            yield batch

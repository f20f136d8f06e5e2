"""The order of images: its whole state is the number of images seen.

Which images a step sees is a pure function of the step, so a run resumes anywhere, with any number
of ranks or workers, by knowing `step = images_seen // global_batch`.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fastjepa.masks.counter import Stream, random_words


@dataclass(frozen=True)
class GlobalOrder:
    """Epochs of `images // global_batch` steps; every image at most once in each.

    The `images % global_batch` last images of an epoch's order are left out, others each epoch.

    Args:
        images: images in the set.
        global_batch: images per optimizer step, over all ranks and micro-batches.
        seed: the order of an epoch is a function of (seed, epoch) alone.
        shuffle: False gives the order of the set in every epoch.

    Raises:
        ValueError: there are fewer images than one global batch takes.
    """

    images: int
    global_batch: int
    seed: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.global_batch <= self.images:
            raise ValueError(
                f"a global batch of {self.global_batch} cannot be drawn from {self.images} images; "
                f"it must be 1 to {self.images}"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.images // self.global_batch

    def batch(self, step: int) -> tuple[int, Tensor]:
        """The epoch of a step, and its images, int64 [global_batch]."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        begin = step_of_epoch * self.global_batch
        if not self.shuffle:
            return epoch, torch.arange(begin, begin + self.global_batch)
        order = _permutation(self.images, self.seed, epoch)
        return epoch, order[begin : begin + self.global_batch].clone()  # a view would expose the cache


@lru_cache(maxsize=1)
def _permutation(images: int, seed: int, epoch: int) -> Tensor:
    """int64 [images]. Equal 32-bit keys, 190 pairs in 1.28 million, keep the order of the set."""
    groups = torch.arange(-(-images // 4))  # Philox gives four words at a time: one for each of four images
    keys = random_words(seed, Stream.IMAGE_ORDER, groups, epoch, 4).flatten()[:images]
    return keys.argsort(stable=True)


def rank_slice(indices: Tensor, rank: int, world_size: int, accumulation: int) -> Tensor:
    """A rank's micro-batches of one step.

    Args:
        indices: int64 [global_batch].
        rank: 0 to world_size - 1.
        world_size: ranks that share the step.
        accumulation: micro-batches of each rank per step.

    Returns:
        int64 [accumulation, micro_batch]. Micro-batches are consecutive pieces of `indices`, so at
        one size they are the same whatever the number of ranks.

    Raises:
        ValueError: the global batch does not divide by world_size x accumulation.
    """
    pieces = world_size * accumulation
    batch = len(indices)
    if batch % pieces:
        above = batch // pieces * pieces + pieces
        nearest = f"{above - pieces} or {above}" if above > pieces else f"{above}"
        raise ValueError(
            f"a global batch of {batch} does not divide into {world_size} ranks x {accumulation} "
            f"micro-batches; the nearest that does is {nearest}"
        )
    return indices.view(accumulation, world_size, batch // pieces)[:, rank]

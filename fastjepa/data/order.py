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

    With shards, an epoch takes them in an order of its own, `shuffle_shards` at a time, and shuffles the
    images of these: reads stay near each other, and no more of the order is computed than is asked for.

    Args:
        images: images in the set.
        global_batch: images per optimizer step, over all ranks and micro-batches.
        seed: the order of an epoch is a function of (seed, epoch) alone.
        shuffle: False gives the order of the set in every epoch.
        shard_ends: how many images there are up to the end of each shard; empty shuffles all images alike.
        shuffle_shards: how many shards are shuffled together.

    Raises:
        ValueError: there are fewer images than one global batch takes, or the last end is another number.
    """

    images: int
    global_batch: int
    seed: int
    shuffle: bool = True
    shard_ends: tuple[int, ...] = ()
    shuffle_shards: int = 16

    def __post_init__(self) -> None:
        if self.shard_ends and self.shard_ends[-1] != self.images:
            raise ValueError(f"the shards end after {self.shard_ends[-1]} images, the set has {self.images}")
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
        if self.shard_ends:
            return epoch, self._from_shards(epoch, begin)
        order = _permutation(self.images, self.seed, epoch)
        return epoch, order[begin : begin + self.global_batch].clone()  # a view would expose the cache

    def _from_shards(self, epoch: int, begin: int) -> Tensor:
        """The images of an epoch's order from `begin` on, int64 [global_batch]."""
        shards, ends = _shard_order(self.shard_ends, self.shuffle_shards, self.seed, epoch)
        found, end = [], begin + self.global_batch
        block = int(torch.searchsorted(ends, begin, right=True))
        while begin < end:
            first = int(ends[block - 1]) if block else 0
            of_block = shards[block * self.shuffle_shards : (block + 1) * self.shuffle_shards]
            order = _block_order(self.shard_ends, tuple(of_block.tolist()), self.seed, epoch)
            found.append(order[begin - first : end - first])
            begin, block = min(end, int(ends[block])), block + 1
        return torch.cat(found)  # a copy, for a view would expose the cache


@lru_cache(maxsize=1)
def _permutation(images: int, seed: int, epoch: int) -> Tensor:
    """int64 [images]. Equal 32-bit keys, 190 pairs in 1.28 million, keep the order of the set."""
    groups = torch.arange(-(-images // 4))  # Philox gives four words at a time: one for each of four images
    keys = random_words(seed, Stream.IMAGE_ORDER, groups, epoch, 4).flatten()[:images]
    return keys.argsort(stable=True)


@lru_cache(maxsize=1)
def _shard_order(
    shard_ends: tuple[int, ...], shuffle_shards: int, seed: int, epoch: int
) -> tuple[Tensor, Tensor]:
    """The shards in an epoch's order, int64 [S], and where each block of them ends there, int64 [blocks]."""
    count = len(shard_ends)
    keys = random_words(seed, Stream.SHARD_ORDER, torch.arange(count), epoch, 1)[:, 0]
    shards = keys.argsort(stable=True)
    ends = torch.tensor(shard_ends)
    sizes = ends.diff(prepend=ends.new_zeros(1))[shards].cumsum(0)
    lasts = torch.arange(shuffle_shards, count + shuffle_shards, shuffle_shards).clamp(max=count) - 1
    return shards, sizes[lasts]


@lru_cache(maxsize=2)  # a step may take the end of one block and the beginning of the next
def _block_order(shard_ends: tuple[int, ...], shards: tuple[int, ...], seed: int, epoch: int) -> Tensor:
    """The images of some shards, shuffled: int64 [images in them]."""
    images = torch.cat(
        [torch.arange(shard_ends[shard - 1] if shard else 0, shard_ends[shard]) for shard in shards]
    )
    keys = random_words(seed, Stream.IMAGE_ORDER, images, epoch, 1)[:, 0]
    return images[keys.argsort(stable=True)]


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

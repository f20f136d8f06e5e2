"""Indexed shards as a set of images by number."""

from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from fastjepa.data.decode import decode_image
from fastjepa.data.shards.index import IndexFileError, read_index
from fastjepa.data.shards.store import RangeReader, folder_of, is_url, stamps_of
from fastjepa.data.unreadable import UnreadableImage


class ShardSet:
    """The images of indexed shards, in the order of the index. Each is read by its range.

    Args:
        root: a folder of shards with their index, or the index; either may be a URL.
        channels: 3 to read as RGB, 1 as grey.

    Attributes:
        labels: int64 [N], an index into `class_names`, or None.
        shard_ends: how many images there are up to the end of each shard.

    Raises:
        IndexFileError: there is no index, or a shard is not what it was when it was indexed.
        StoreError: a shard is missing, or its store does not answer.
        ValueError: `channels` is neither 1 nor 3.
    """

    def __init__(self, root: str | Path, channels: int = 3) -> None:
        if channels not in (1, 3):
            raise ValueError(f"channels is {channels}; images are read as 3 (RGB) or 1 (grey)")
        self.root = str(root)
        self.channels = channels
        self.images: Tensor | None = None  # nothing is kept in memory
        self._index = read_index(root)
        self._reader = RangeReader()
        self._check_shards()
        labels = self._index.labels
        self.labels: Tensor | None = None if labels is None else labels.long()
        self.class_names = self._index.class_names
        self.shard_ends: tuple[int, ...] = tuple(self._index.shard_ends.tolist())

    def _check_shards(self) -> None:
        index = self._index
        for shard, then, now in zip(index.shards, index.stamps, stamps_of(index.shards), strict=True):
            if difference := then.differs(now):
                everything = "SHARDS…" if is_url(shard) else f"{folder_of(shard)}/*.tar"
                raise IndexFileError(
                    f"the shard {shard} was changed after it was indexed: {difference}. Put the old one "
                    f"back, or index all again: fastjepa data index --force {everything}"
                )

    def __reduce__(self) -> tuple[Any, ...]:  # where processes cannot be forked, each opens its own
        return ShardSet, (self.root, self.channels)

    def __len__(self) -> int:
        return len(self._index)

    def path(self, index: int) -> str:
        """The shard of an image, and its name there."""
        return f"{self._index.shards[self._index.shard_of(index)]}/{self._index.name(index)}"

    def encoded(self, index: int) -> bytes:
        """The bytes of the image's file.

        Raises:
            UnreadableImage: the shard ends before, or the drive fails.
            StoreError: a store does not answer.
        """
        shard = self._index.shards[self._index.shard_of(index)]
        offset, size = int(self._index.offsets[index]), int(self._index.sizes[index])
        try:
            content = self._reader.read(shard, offset, size)
        except OSError as error:
            if is_url(shard):
                raise
            raise UnreadableImage(self.path(index), f"{type(error).__name__}: {error}") from error
        if len(content) != size:
            reason = f"{len(content)} of its {size} bytes are there; the shard was cut off"
            raise UnreadableImage(self.path(index), reason)
        return content

    def read(self, index: int, min_side: int | None = None) -> Image.Image:
        """One image, as `decode_image` gives it; raises what `encoded` raises."""
        return decode_image(self.encoded(index), self.channels, min_side, path=self.path(index))

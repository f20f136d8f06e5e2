"""From shards to their index."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fastjepa.data.shards.index import ShardIndex, shard_ends
from fastjepa.data.shards.scan import Found, ShardError, scan_shard
from fastjepa.data.shards.store import folder_of, is_url, open_shard, stamp_of

CLASSES_NAME = "classes.txt"
_LARGEST_IMAGE = 2**31 - 1  # bytes


def index_shards(
    shards: Sequence[str], with_labels: bool = True, seen: Callable[[str], None] = lambda shard: None
) -> ShardIndex:
    """Scan shards for images. Local ones are read at their headers, those behind a URL to their end.

    Class names are the lines of a `classes.txt` beside the first shard, else the numbers themselves.

    Args:
        shards: paths or URLs, in the order they are to have.
        with_labels: whether to look for labels.
        seen: is told of each shard after it was scanned.

    Raises:
        StoreError: a shard cannot be read, or changed meanwhile.
        ShardError: a shard is damaged, there are no images, or labels do not fit.
    """
    if twice := {shard for shard in shards if shards.count(shard) > 1}:
        raise ShardError(f"{min(twice)} was given twice")
    stamps, parts = [], []
    for shard in shards:
        before = stamp_of(shard)
        with open_shard(shard) as stream:
            parts.append(scan_shard(stream, shard, before.size, with_labels))
        if difference := before.differs(stamp_of(shard)):
            raise ShardError(f"{shard} was written to while it was indexed ({difference}); index it again")
        stamps.append(before)
        seen(shard)
    counts = [len(part.names) for part in parts]
    if not sum(counts):
        raise ShardError(f"no images in {len(shards)} shard(s), the first of them {shards[0]}")
    names = [os.fsencode(name) for part in parts for name in part.names]
    sizes = [size for part in parts for size in part.sizes]
    if max(sizes) > _LARGEST_IMAGE:
        raise ShardError(f"an image of {max(sizes):,} bytes; an index takes them up to {_LARGEST_IMAGE:,}")
    labels = _labels(shards, parts) if with_labels else None
    return ShardIndex(
        shards=tuple(shards),
        stamps=tuple(stamps),
        shard_ends=shard_ends(counts),
        offsets=torch.tensor([offset for part in parts for offset in part.offsets], dtype=torch.int64),
        sizes=torch.tensor(sizes, dtype=torch.int32),
        names=torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8),
        name_ends=torch.tensor([len(name) for name in names]).cumsum(0),
        labels=None if labels is None else torch.tensor(labels, dtype=torch.int32),
        class_names=None if labels is None else _class_names(shards[0], max(labels)),
    )


def _labels(shards: Sequence[str], parts: Sequence[Found]) -> list[int] | None:
    labels, first_without, total = [], "", 0
    for shard, part in zip(shards, parts, strict=True):
        total += len(part.labels)
        labels += [label for label in part.labels if label is not None]
        if not first_without and None in part.labels:
            first_without = f"{shard}/{part.names[part.labels.index(None)]}"
    if not labels:
        return None
    if first_without:
        raise ShardError(
            f"{len(labels):,} of {total:,} images have a label, and {first_without} has none: label all, or "
            "leave labels out with --no-labels"
        )
    return labels


def _class_names(shard: str, largest: int) -> tuple[str, ...]:
    """Of classes 0 to `largest`."""
    path = Path(folder_of(shard)) / CLASSES_NAME
    if is_url(shard) or not path.exists():
        return tuple(map(str, range(largest + 1)))
    # Not splitlines: to it some characters that names may hold end a line too.
    names = path.read_text(encoding="utf-8", errors="surrogateescape").removesuffix("\n").split("\n")
    if len(names) <= largest:
        raise ShardError(
            f"{path} names {len(names)} classes, and an image has the label {largest}: it is not of these "
            "shards. Correct or remove it"
        )
    return tuple(names)

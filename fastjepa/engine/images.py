"""Which images a run trains on, and which judge it."""

import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

from fastjepa.config import Config, ConfigError
from fastjepa.data.fashion_mnist import FashionMNIST
from fastjepa.data.folder import ImageFolder, check_no_splits
from fastjepa.data.shards.shard_set import ShardSet
from fastjepa.data.shards.store import is_url
from fastjepa.data.subset import Subset
from fastjepa.data.views import ImageSet

_NAMES = 1000


@dataclass(frozen=True)
class RunImages:
    """Attributes:
    train: what the objective sees, without labels.
    bank, queries: labelled images that probes learn from and are judged on; None if there are none.
    note: why there is no probe, or what it is judged on.
    shard_ends: how many of `train` there are up to the end of each shard; empty without shards.
    """

    train: ImageSet
    bank: ImageSet | None
    queries: ImageSet | None
    note: str
    shard_ends: tuple[int, ...] = ()

    def checksum(self) -> int:
        """Of the names of some training images and their places: of another set almost surely another."""
        count = len(self.train)
        asked = {i * count // _NAMES for i in range(_NAMES)} | {count - 1}
        # Not of their folders, which may move.
        names = [f"{i} {self.train.path(i).rpartition('/')[2]}" for i in sorted(asked)]
        return zlib.crc32("\n".join(names).encode(errors="surrogateescape"))


def open_images(config: Config) -> RunImages:
    """Open the sets that the configuration names.

    Raises:
        ConfigError: a folder that is not there or holds no images, or settings that do not fit it.
    """
    data = config.data
    shard_ends: tuple[int, ...] = ()
    try:
        train: ImageSet
        held_out: ImageSet | None
        if data.name == "fashion_mnist":
            train = FashionMNIST(data.root, "train")
            held_out = None if data.hold_out else FashionMNIST(data.root, "test")
            kind = "test images"
        elif data.name == "shards":
            assert data.root is not None  # the configuration was checked
            shards = ShardSet(data.root, data.channels)
            train, shard_ends = shards, shards.shard_ends
            held_out = _shards_or_folder(data.probe_root, data.channels) if data.probe_root else None
            kind = f"images of {data.probe_root}"
        else:
            assert data.root is not None  # the configuration was checked
            folder = ImageFolder(data.root, data.channels)
            check_no_splits(folder)
            train = folder
            held_out = ImageFolder(data.probe_root, data.channels) if data.probe_root else None
            kind = f"images of {data.probe_root}"
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    if train.channels != data.channels:
        raise ConfigError(f"these images have {train.channels} channel(s), data.channels is {data.channels}")

    if data.hold_out:
        if not 0 < data.hold_out < len(train):
            raise ConfigError(
                f"data.hold_out must leave images to train on: it is {data.hold_out} of {len(train)}"
            )
        # Evenly spread, since a folder is sorted by class.
        chosen = torch.arange(data.hold_out) * len(train) // data.hold_out
        rest = torch.ones(len(train), dtype=torch.bool)
        rest[chosen] = False
        if shard_ends:
            shard_ends = tuple(rest.cumsum(0)[torch.tensor(shard_ends) - 1].tolist())
        train, held_out = Subset(train, rest.nonzero()[:, 0]), Subset(train, chosen)
        kind = "training images, held out"

    if held_out is None:
        return RunImages(
            train, None, None, "no probe: set data.probe_root or data.hold_out to judge", shard_ends
        )
    unlabelled = "the images have no labels" if shard_ends else "the images are in no class folders"
    if train.labels is None or held_out.labels is None:
        return RunImages(train, None, None, f"no probe: {unlabelled}", shard_ends)
    if list(train.class_names or ()) != list(held_out.class_names or ()):
        raise ConfigError(
            f"data.probe_root has other classes than data.root: {_some(held_out)} instead of {_some(train)}"
        )
    count = min(len(held_out), config.probe.final_queries)
    return RunImages(train, train, held_out, f"judged on {count:,} {kind}", shard_ends)


def _shards_or_folder(root: str, channels: int) -> ImageSet:
    """Shards if there are any, else a folder of images."""
    if not is_url(root) and Path(root).is_dir() and not any(Path(root).glob("*.tar")):
        return ImageFolder(root, channels)
    return ShardSet(root, channels)


def _some(images: ImageSet) -> str:
    names = list(images.class_names or ())
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")

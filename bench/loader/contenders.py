"""What is timed: ours by each source and decoder, a plain DataLoader, and webdataset. One core each."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastjepa.data.decoders import Decoder
from fastjepa.data.folder import ImageFolder
from fastjepa.data.shards.shard_set import ShardSet
from fastjepa.data.transforms import Augmentation
from fastjepa.data.views import ImageSet, Reading, read_views

SIZE, BATCH = 224, 32
SCALE, RATIO, FLIP = (0.3, 1.0), (3 / 4, 4 / 3), 0.5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Contender = Callable[[int], int]  # reads images for one round, whose number it is given; how many


def contenders(folder: Path, shards: Path, small: Path, images: int) -> dict[str, Contender]:
    """By name. All read `images` images of the same photographs in a round, in batches.

    Args:
        folder: the photographs.
        shards: their files, byte for byte, in shards.
        small: shards packed at a short side of 256.
        images: of a round.
    """
    ours: dict[str, tuple[ImageSet, Reading]] = {}
    sources: dict[str, ImageSet] = {
        "folder": ImageFolder(folder),
        "shards": ShardSet(shards),
        "packed 256": ShardSet(small),
    }
    decoders: tuple[Decoder, ...] = ("pillow", "torchvision")
    for source, data in sources.items():
        for decoder in decoders:
            ours[f"fastjepa, {source}, {decoder}"] = data, Reading(decoder)
            name = f"fastjepa, {source}, {decoder}, resized on the device"
            ours[name] = data, Reading(decoder, "device")
    found: dict[str, Contender] = {
        "DataLoader, ImageFolder, fp32 normalised": partial(_plain, folder, images, True),
        "DataLoader, ImageFolder, uint8": partial(_plain, folder, images, False),
        "webdataset, shards, uint8": partial(_webdataset, shards, images),
        "webdataset, packed 256, uint8": partial(_webdataset, small, images),
    }
    return found | {name: partial(_ours, *of, images) for name, of in ours.items()}


def _ours(data: ImageSet, reading: Reading, images: int, number: int) -> int:
    augmentation = Augmentation(SCALE, RATIO, FLIP)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(number))[:images]
    return sum(
        len(read_views(data, batch.tolist(), SIZE, augmentation, 0, number, reading).pixels)
        for batch in order.split(BATCH)
    )


def _transform(normalised: bool) -> Any:
    from torchvision import transforms

    bicubic = transforms.InterpolationMode.BICUBIC
    augment = [
        transforms.RandomResizedCrop(SIZE, SCALE, RATIO, bicubic),
        transforms.RandomHorizontalFlip(FLIP),
    ]
    if normalised:
        return transforms.Compose([*augment, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    return transforms.Compose([*augment, transforms.PILToTensor()])


def _plain(folder: Path, images: int, normalised: bool, number: int) -> int:
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision.datasets import ImageFolder as Plain

    torch.manual_seed(number)
    data = Plain(str(folder), _transform(normalised))
    sampler = RandomSampler(data, num_samples=min(images, len(data)))
    return sum(len(pixels) for pixels, _ in DataLoader(data, BATCH, sampler=sampler))


def _webdataset(shards: Path, images: int, number: int) -> int:
    import webdataset

    torch.manual_seed(number)
    urls = sorted(map(str, shards.glob("*.tar")))
    data = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=number).shuffle(100).decode("pil")
    samples: Iterator[Any] = iter(data.to_tuple("jpg").map_tuple(_transform(False)).batched(BATCH))
    read = 0
    for (pixels,) in samples:
        read += len(pixels)
        if read >= images:
            break
    return read

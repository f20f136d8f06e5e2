"""What is in a set of images: counts, sizes, formats, bad ones, and the mean and spread of pixels."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastjepa.data.decode import open_image, orientation_of, unreadable_unless_good
from fastjepa.data.decoders import read_view
from fastjepa.data.folder import ImageFolder
from fastjepa.data.shards.shard_set import ShardSet
from fastjepa.data.shards.store import is_url
from fastjepa.data.transforms import center_box
from fastjepa.data.unreadable import UnreadableImage
from fastjepa.data.workers import in_order, note

Progress = Callable[[str, int, str], AbstractContextManager[Callable[[int], None]]]

_AT_A_TIME = 8
_TIMEOUT_S = 300.0
_NAMED = 5  # bad images in what is printed
_QUANTILES = {"smallest": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "largest": 1.0}


@dataclass
class Stats:
    """Of the images that were looked at.

    Attributes:
        images: in the set.
        looked_at: of them, the bad ones included.
        labels: classes; 0 without labels.
        of_class: images of each class, by its name, in the whole set.
        width, height, bytes: quantile -> pixels, pixels, bytes.
        aspect: quantile -> width / height.
        formats: format and kind of pixels -> images.
        turned: images that EXIF turns.
        mean, std: of RGB, pixels of central views, from 0 to 1: for data.mean and data.std.
        bad: path -> reason.
    """

    images: int
    looked_at: int
    labels: int
    of_class: dict[str, int]
    width: dict[str, float]
    height: dict[str, float]
    bytes: dict[str, float]
    aspect: dict[str, float]
    formats: dict[str, int]
    turned: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bad: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Looked(NamedTuple):
    """What one image is; sums are those of its view, by channel."""

    width: int = 0
    height: int = 0
    bytes: int = 0
    kind: str = ""
    is_turned: bool = False
    sums: tuple[float, ...] = ()
    squares: tuple[float, ...] = ()
    path: str = ""
    reason: str = ""


@dataclass(frozen=True)
class _Look:
    images: ImageFolder | ShardSet
    size: int

    def __call__(self, numbers: list[int]) -> list[_Looked]:
        return [self._one(number) for number in numbers]

    def _one(self, number: int) -> _Looked:
        note(number)
        path = self.images.path(number)
        try:
            content = self.images.encoded(number)
            with unreadable_unless_good(path), open_image(content) as image:
                width, height, kind = *image.size, f"{image.format} {image.mode}"
                is_turned = orientation_of(image) != 1
            pixels = read_view(content, path, 3, self.size, center_box, False, "pillow").double().flatten(1)
        except UnreadableImage as error:
            return _Looked(path=path, reason=error.reason)
        sums, squares = pixels.mean(1) / 255, pixels.square().mean(1) / 255**2
        return _Looked(
            width, height, len(content), kind, is_turned, tuple(sums.tolist()), tuple(squares.tolist())
        )


def open_set(root: str, channels: int = 3) -> ImageFolder | ShardSet:
    """Shards where there are any, else a folder of images, read as RGB (3) or grey (1).

    Raises:
        ValueError, OSError: neither; the message says which.
    """
    path = Path(root)
    if is_url(root) or path.is_file() or any(path.glob("*.tar")):
        return ShardSet(root, channels)
    return ImageFolder(root, channels)


def measure(
    images: ImageFolder | ShardSet, limit: int | None, size: int, workers: int, progress: Progress
) -> Stats:
    """Look at every image, or at `limit` of them, spread evenly.

    Args:
        images: the set.
        limit: how many; None for all.
        size: of the central views whose pixels are measured: the spread of pixels depends on it.
        workers: processes; 0 does it here.
        progress: a context manager for a bar.

    Raises:
        ValueError: none of them can be read.
    """
    count = len(images) if limit is None else min(limit, len(images))
    chosen = torch.arange(count) * len(images) // count  # [count]
    parts = (part.tolist() for part in chosen.split(_AT_A_TIME))
    looked: list[_Looked] = []
    results = in_order(
        _Look(images, size), parts, workers=workers, describe=images.path, timeout_s=_TIMEOUT_S
    )
    with progress("Looking", count, "images") as advance, closing(results):
        for batch in results:
            looked += batch
            advance(len(batch))
    good, bad = (
        [one for one in looked if not one.reason],
        {one.path: one.reason for one in looked if one.reason},
    )
    if not good:
        path, reason = next(iter(bad.items()))
        raise ValueError(f"none of {count} images can be read; the first: {path}: {reason}")
    mean = torch.tensor([one.sums for one in good], dtype=torch.float64).mean(0)  # [C]
    spread = torch.tensor([one.squares for one in good], dtype=torch.float64).mean(0) - mean.square()
    names = images.class_names or ()
    return Stats(
        images=len(images),
        looked_at=count,
        labels=len(names),
        of_class=_of_class(names, images.labels),
        width=_quantiles([one.width for one in good]),
        height=_quantiles([one.height for one in good]),
        bytes=_quantiles([one.bytes for one in good]),
        aspect=_quantiles([one.width / one.height for one in good]),
        formats=dict(Counter(one.kind for one in good).most_common()),
        turned=sum(one.is_turned for one in good),
        mean=tuple(round(value, 4) for value in mean.tolist()),
        std=tuple(round(value, 4) for value in spread.clamp(min=0).sqrt().tolist()),
        bad=bad,
    )


def _of_class(names: Sequence[str], labels: Tensor | None) -> dict[str, int]:
    if labels is None:
        return {}
    return dict(zip(names, labels.bincount(minlength=len(names)).tolist(), strict=True))


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {name: ordered[round(at * (len(ordered) - 1))] for name, at in _QUANTILES.items()}


def say(stats: Stats) -> str:
    """For the terminal."""
    of = "" if stats.looked_at == stats.images else f" (looked at {stats.looked_at:,})"
    lines = [f"{stats.images:,} images{of}, " + (f"{stats.labels} classes" if stats.labels else "no labels")]
    if stats.of_class:
        few, many = min(stats.of_class.values()), max(stats.of_class.values())
        lines.append(f"images of a class      {few:,} to {many:,}")
    lines.append(f"{'':22} " + " ".join(f"{name:>10}" for name in _QUANTILES))
    for name, quantiles in (("width", stats.width), ("height", stats.height), ("bytes", stats.bytes)):
        lines.append(f"{name:22} " + " ".join(f"{value:10,.0f}" for value in quantiles.values()))
    lines.append(f"{'width / height':22} " + " ".join(f"{value:10.2f}" for value in stats.aspect.values()))
    lines += [f"{kind:22} {count:10,}" for kind, count in stats.formats.items()]
    if stats.turned:
        lines.append(f"{'turned by EXIF':22} {stats.turned:10,}")
    lines.append(f"{'cannot be read':22} {len(stats.bad):10,}")
    lines += [f"  {path}: {reason}" for path, reason in list(stats.bad.items())[:_NAMED]]
    lines.append(f"data.mean={list(stats.mean)} data.std={list(stats.std)}".replace(", ", ","))
    return "\n".join(lines)

"""Which labelled images a probe learns from, and which it is tested on."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastjepa.config import Config, ConfigError
from fastjepa.data.fashion_mnist import FashionMNIST
from fastjepa.data.folder import ImageFolder
from fastjepa.data.shards.shard_set import ShardSet
from fastjepa.data.shards.store import is_url
from fastjepa.data.stats import open_set
from fastjepa.data.subset import Subset
from fastjepa.data.views import ImageSet
from fastjepa.engine.images import open_images
from fastjepa.evaluation.low_shot import split_of_classes
from fastjepa.probe.subjects import ProbeError

EMBEDDED = "fashion_mnist"
_TEST_PART = 0.2  # of every class, of a folder that is not divided
_TEST_FOLDERS = ("val", "test", "valid", "validation")


@dataclass(frozen=True)
class ProbeImages:
    """Attributes:
    train: labelled images that probes learn from, and the bank of kNN.
    test: labelled images that choose nothing.
    note: where they are from, in words.
    fingerprint: sha256 of which images they are, in which order, with which labels.
    """

    train: ImageSet
    test: ImageSet
    note: str
    fingerprint: str


def open_probe_images(
    folders: Sequence[str],
    config: Config | None,
    channels: int,
    seed: int,
    train_images: int | None = None,
    test_images: int | None = None,
) -> ProbeImages:
    """The images that a probe was told to use, or those of the run.

    Args:
        folders: of class folders, or of indexed shards: two are for learning and for the test; one is both,
            divided into `train` and `val` or `test`, or by us; `fashion_mnist` is the subset that comes with
            fastjepa. None: the run's own.
        config: of the run; None for a file.
        channels: as images in folders are to be read.
        seed: of the division of a folder.
        train_images, test_images: take so many, spread evenly; None takes all.

    Raises:
        ProbeError: no such folder, one class, fewer images than classes, or classes that differ.
    """
    try:
        train, test, note = _open(folders, config, channels, seed)
    except (ValueError, OSError) as error:
        raise ProbeError(str(error)) from error
    train, test = _spread(train, train_images), _spread(test, test_images)
    labels = train.labels
    assert labels is not None
    assert test.labels is not None
    classes = len(train.class_names or ())
    if len(labels.unique()) < classes:
        raise ProbeError(
            f"{len(train)} images to learn from hold {len(labels.unique())} of {classes} classes: give more "
            f"images, at least one of every class{'' if train_images is None else ', with --train-images'}"
        )
    return ProbeImages(
        train, test, f"{note}: {len(train):,} to learn from, {len(test):,} tested", _fingerprint(train, test)
    )


def _open(
    folders: Sequence[str], config: Config | None, channels: int, seed: int
) -> tuple[ImageSet, ImageSet, str]:
    if not folders:
        if config is None:
            raise ProbeError("a file does not say which images to use: give --data FOLDER")
        try:
            images = open_images(config)
        except ConfigError as error:
            raise ProbeError(f"the run's own images: {error}; or give --data FOLDER") from error
        if images.bank is None or images.queries is None:
            raise ProbeError(f"the run's own images have no labels ({images.note}): give --data FOLDER")
        return images.bank, images.queries, f"images of the run ({config.data.root or config.data.name})"
    if list(folders) == [EMBEDDED]:
        return FashionMNIST(split="train"), FashionMNIST(split="test"), "Fashion-MNIST, embedded"
    if len(folders) > 2:
        raise ProbeError(
            f"--data has {len(folders)} folders: give one, or two, to learn from and to be tested on"
        )
    if len(folders) == 1:
        root = Path(folders[0])
        inside = [root / name for name in _TEST_FOLDERS if (root / name).is_dir()]
        if not ((root / "train").is_dir() and inside):
            whole = _labelled(folders[0], channels)
            train, test = _divide(whole, folders[0], seed)
            return train, test, f"{root}, {_TEST_PART:.0%} of every class for the test"
        folders = [str(root / "train"), str(inside[0])]
    if not any(map(is_url, folders)) and os.path.exists(folders[1]) and os.path.samefile(*folders):
        raise ProbeError(
            f"{folders[0]} is given to learn from and to be tested on: probes would be tested on what they "
            "learned by heart. Give it once, and a fifth of every class is the test"
        )
    first, second = (_labelled(folder, channels) for folder in folders)
    theirs, ours = set(second.class_names or ()), set(first.class_names or ())
    if first.class_names != second.class_names:
        odd = sorted(theirs ^ ours)
        some = ", ".join(odd[:4]) + (", …" if len(odd) > 4 else "")
        raise ProbeError(
            f"{folders[0]} and {folders[1]} have other classes; in one of them only: {some}. Give both the "
            "same sub-folders"
        )
    return first, second, f"{folders[0]} and {folders[1]}"


def _labelled(folder: str, channels: int) -> ImageFolder | ShardSet:
    images = open_set(folder, channels)
    if images.labels is None and isinstance(images, ShardSet):
        raise ProbeError(f"the images of the shards in {folder} have no labels: index them with their labels")
    if images.labels is None:
        classes = [entry.name for entry in sorted(os.scandir(folder), key=lambda e: e.name) if entry.is_dir()]
        found = f"one sub-folder, {classes[0]}" if len(classes) == 1 else f"{len(classes)} sub-folders"
        raise ProbeError(
            f"{folder} has no classes to tell apart: it holds {found}. Every image must lie in one of at "
            "least two sub-folders, one for each class"
        )
    return images


def _divide(whole: ImageFolder | ShardSet, folder: str, seed: int) -> tuple[Subset, Subset]:
    labels, names = whole.labels, whole.class_names
    assert labels is not None
    assert names is not None
    few = (torch.bincount(labels, minlength=len(names)) < 2).nonzero()[:, 0].tolist()
    if few:
        raise ProbeError(
            f"{folder} has one image of {names[few[0]]}{' and others' if len(few) > 1 else ''}, and a class "
            "needs two, one to learn from and one to test: add images, or give two folders"
        )
    test, train = split_of_classes(labels, _TEST_PART, seed)
    return Subset(whole, train), Subset(whole, test)


def _spread(images: ImageSet, limit: int | None) -> ImageSet:
    """Evenly over the set, which may be sorted by class."""
    if limit is None or limit >= len(images):
        return images
    return Subset(images, torch.arange(limit) * len(images) // limit)


def _fingerprint(*sets: ImageSet) -> str:
    digest = hashlib.sha256()
    for images in sets:
        assert images.labels is not None
        digest.update(f"{len(images)} {list(images.class_names or ())}".encode())
        digest.update(images.labels.contiguous().numpy().data)
        if images.images is not None:
            digest.update(images.images.contiguous().numpy().data)
            continue
        for index in range(len(images)):  # the folder may move
            path = images.path(index)
            name = "/".join(path.split("/")[-2:])
            digest.update(f"{name} {_size_of(path)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _size_of(path: str) -> int | None:
    """In bytes; None in a shard, or of a file that is gone, which reading will count as unreadable."""
    try:
        return os.stat(path).st_size
    except OSError:
        return None

"""A folder of image files, at any depth."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from fastjepa.data.decode import decode_image, unreadable_unless_good

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")

# Folders of these names, and of no others, are parts of a data set and no classes.
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "eval"}


class ImageFolder:
    """The image files below a folder, in the order of their names, folder by folder.

    Names that begin with a dot are left out (macOS puts a `._x.jpg` that is no image beside every
    `x.jpg`). Links to folders are followed. Nothing is opened before it is read.

    Args:
        root: the folder.
        channels: 3 to read as RGB, 1 as grey.

    Attributes:
        labels: int64 [N], an index into `class_names`; None unless every image lies in one of at
            least two sub-folders of `root`.
        class_names: names of those sub-folders, sorted, or None.

    Raises:
        NotADirectoryError: `root` is not a folder.
        ValueError: there is no image below it, or `channels` is neither 1 nor 3.
    """

    def __init__(self, root: str | Path, channels: int = 3) -> None:
        if channels not in (1, 3):
            raise ValueError(f"channels is {channels}; images are read as 3 (RGB) or 1 (grey)")
        self.root = os.fsencode(root)
        self.channels = channels
        self.images: Tensor | None = None  # nothing is kept in memory
        if not os.path.isdir(self.root):
            raise NotADirectoryError(f"{root} is not a folder; data root must be a folder of images")

        # A million str objects would be 150 MB, copied page by page into every worker as
        # reference counts change. One run of bytes is a third of it and shared.
        names, ends = bytearray(), []
        classes: dict[bytes, int] = {}
        labels = []
        for name in _walk(self.root, b"", frozenset()):
            names += name
            ends.append(len(names))
            first, slash, _ = name.partition(b"/")
            labels.append(classes.setdefault(first, len(classes)) if slash else -1)
        if not ends:
            raise ValueError(f"no images below {root}; looked for {', '.join(EXTENSIONS)}")

        self._names = torch.frombuffer(names, dtype=torch.uint8)  # paths below root, one after another
        self._ends = torch.tensor(ends)  # [N]
        self.labels: Tensor | None = None
        self.class_names: tuple[str, ...] | None = None
        if len(classes) > 1 and -1 not in labels:
            self.labels = torch.tensor(labels)  # [N]
            self.class_names = tuple(os.fsdecode(name) for name in classes)

    def __len__(self) -> int:
        return len(self._ends)

    def fingerprint(self) -> str:
        """Of the names of all images: another if one is added, removed or renamed."""
        names = hashlib.sha256(self._names.numpy().tobytes())
        names.update(self._ends.numpy().tobytes())
        return names.hexdigest()[:16]

    def path(self, index: int) -> str:
        """The file of an image."""
        start = int(self._ends[index - 1]) if index else 0
        name = self._names[start : int(self._ends[index])].numpy().tobytes()
        return os.fsdecode(os.path.join(self.root, name))

    def read(self, index: int, min_side: int | None = None) -> Image.Image:
        """One image, as `decode_image` gives it; raises UnreadableImage."""
        return decode_image(self.encoded(index), self.channels, min_side, path=self.path(index))

    def encoded(self, index: int) -> bytes:
        """The bytes of the image's file; raises UnreadableImage."""
        path = self.path(index)
        with unreadable_unless_good(path), open(path, "rb") as file:
            return file.read()


def check_no_splits(images: ImageFolder) -> None:
    """Raises ValueError if the folders that look like classes are the parts of a data set."""
    names = images.class_names or ()
    if names and {name.lower() for name in names} <= _SPLITS:
        root = os.fsdecode(images.root)
        raise ValueError(
            f"{root} holds {', '.join(names)}, which are parts of a data set and no classes: give one of "
            f"them, such as {os.path.join(root, names[0])}"
        )


def _walk(root: bytes, below: bytes, ancestors: frozenset[tuple[int, int]]) -> Iterator[bytes]:
    """Paths of image files, relative to `root`, sorted within each folder."""
    folder = os.path.join(root, below)
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:  # a link back up would never end
        return
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        name = os.path.join(below, entry.name)
        if entry.name.startswith(b"."):
            continue
        if _is_folder(entry):
            yield from _walk(root, name, ancestors | {identity})
        elif os.path.splitext(os.fsdecode(entry.name))[1].lower() in EXTENSIONS:
            yield name


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; with the name of an image it is one that cannot be read
        return False

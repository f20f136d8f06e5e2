"""Fashion-MNIST (Xiao et al., arXiv:1708.07747): a subset that comes with the package, or all of it.

Small enough to try every recipe on a laptop, with labels to tell whether it worked.
"""

import gzip
import math
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

_CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_FILE_PREFIXES = {"train": "train", "test": "t10k"}
_SIDE = 28
_MOST_BYTES = 1 << 30  # twenty times the whole training set: a header that promises more is broken


class FashionMNIST:
    """Grey images of clothes, all in memory.

    Args:
        root: a folder with the original idx files, packed (`.gz`) or not. None takes the subset in
            this package: the first 10,000 training images and all 10,000 test images.
        split: "train" or "test".

    Attributes:
        images: uint8 [N, 1, 28, 28].
        labels: int64 [N], an index into `class_names`.

    Raises:
        FileNotFoundError: `root` lacks a file; both accepted names are in the message.
        ValueError: an unknown split, or a file that is not what its name says.
    """

    class_names = _CLASS_NAMES
    channels = 1

    def __init__(self, root: str | Path | None = None, split: Literal["train", "test"] = "train") -> None:
        if split not in _FILE_PREFIXES:
            raise ValueError(f'split is {split!r}; Fashion-MNIST has "train" and "test"')
        folder = Path(__file__).parent if root is None else Path(root)
        prefix = _FILE_PREFIXES[split]
        self.path_of_images = _find(folder, f"{prefix}-images-idx3-ubyte")
        path_of_labels = _find(folder, f"{prefix}-labels-idx1-ubyte")
        images, labels = read_idx(self.path_of_images, 3), read_idx(path_of_labels, 1)

        if images.shape[1:] != (_SIDE, _SIDE):
            raise ValueError(f"{self.path_of_images}: images of {list(images.shape[1:])}, expected 28 x 28")
        if len(images) != len(labels):
            raise ValueError(f"{path_of_labels}: {len(labels)} labels for {len(images)} images")
        if int(labels.max()) >= len(_CLASS_NAMES):
            raise ValueError(f"{path_of_labels}: label {int(labels.max())}, expected 0 to 9")
        self.images = images[:, None]  # [N, 1, 28, 28]
        self.labels = labels.long()  # [N]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int, min_side: int | None = None) -> "Image.Image":
        """One image. It never comes reduced, so `min_side` changes nothing."""
        from PIL import Image  # of fastjepa[train]; the tensors alone can do without it

        return Image.fromarray(self.images[index, 0].numpy())

    def encoded(self, index: int) -> None:
        """Nothing: the pixels are in memory."""

    def path(self, index: int) -> str:
        """The file that holds the image, and its place there."""
        return f"{self.path_of_images}[{index}]"


def _find(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{folder} has neither {name}.gz nor {name}: put the original Fashion-MNIST files there, "
        "or leave root out for the subset that comes with fastjepa"
    )


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Read a file of bytes in the idx format, packed if its name ends in `.gz`.

    Args:
        path: the file.
        dimensions: how many sizes its header must hold.

    Returns:
        uint8, of the shape in the header.

    Raises:
        ValueError: another magic number, a broken `.gz`, or not exactly as many bytes as the header
            promises; the message names the file.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * dimensions)
            magic = bytes((0, 0, 8, dimensions))  # 8: the code of unsigned bytes
            if header[:4] != magic:
                raise ValueError(f"{path}: starts with {header[:4].hex(' ')}, expected {magic.hex(' ')}")
            if len(header) < 4 + 4 * dimensions:
                raise ValueError(f"{path}: ends inside its header")
            shape = [int.from_bytes(header[at : at + 4], "big") for at in range(4, len(header), 4)]
            size = math.prod(shape)
            if not 0 < size <= _MOST_BYTES:
                raise ValueError(f"{path}: its header promises {size} bytes, which this set cannot have")
            # One byte more than promised is asked for, so that a file too long is seen without
            # unpacking the rest of it.
            data = bytearray(file.read(size + 1))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: a broken or truncated gzip file ({error})") from error
    if len(data) != size:
        relation = "more" if len(data) > size else f"{len(data)}, fewer"
        raise ValueError(f"{path}: holds {relation} bytes than the {size} its header promises")
    return torch.frombuffer(data, dtype=torch.uint8).view(shape)

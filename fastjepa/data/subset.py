"""Some images of a set, as a set of its own."""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from fastjepa.data.views import ImageSet


class Subset:
    """The images of `whole` at `indices` (int64 [n]), numbered from 0."""

    def __init__(self, whole: ImageSet, indices: Tensor) -> None:
        self.whole, self.indices = whole, indices
        self.images = None if whole.images is None else whole.images[indices]
        self.labels = None if whole.labels is None else whole.labels[indices]
        self.class_names: Sequence[str] | None = whole.class_names
        self.channels = whole.channels

    def __len__(self) -> int:
        return len(self.indices)

    def path(self, index: int) -> str:
        return self.whole.path(int(self.indices[index]))

    def read(self, index: int, min_side: int | None = None) -> Image.Image:
        return self.whole.read(int(self.indices[index]), min_side)

    def encoded(self, index: int) -> bytes | None:
        return self.whole.encoded(int(self.indices[index]))

"""One image on its way into a shard."""

from dataclasses import dataclass
from io import BytesIO
from typing import NamedTuple

from PIL import Image

from fastjepa.data.decode import decode_image, open_image, unreadable_unless_good
from fastjepa.data.folder import ImageFolder
from fastjepa.data.unreadable import UnreadableImage
from fastjepa.data.workers import note

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}  # the others' are their names

_LONGEST = 65_500  # pixels of a side that libjpeg encodes


@dataclass(frozen=True)
class Packing:
    """What decides about the content of shards.

    Attributes:
        short_side: of images, in pixels; larger ones are reduced to it, smaller ones stay.
        quality: of JPEG, 1 to 100.
        shard_bytes: a shard is closed before it would become larger.
        copy_small: files whose shorter side is no longer than `short_side` are taken byte for byte.
        in_order: the images stay in the order of the folder, and so the classes together.
    """

    short_side: int = 256
    quality: int = 90
    shard_bytes: int = 512_000_000
    copy_small: bool = False
    in_order: bool = False


class Encoded(NamedTuple):
    """An image as it will stand in a shard, or why it will not.

    Attributes:
        number: in the folder.
        content: empty if it is skipped.
        extension: without a dot.
        is_copy: byte for byte.
        reason: why it is skipped.
    """

    number: int
    content: bytes
    extension: str = "jpg"
    is_copy: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Encoder:
    """Encodes images by number; what a worker process does."""

    images: ImageFolder
    packing: Packing

    def __call__(self, numbers: list[int]) -> list[Encoded]:
        return [self._encode(number) for number in numbers]

    def _encode(self, number: int) -> Encoded:
        note(number)
        try:
            content = self.images.encoded(number)
            return encode(content, number, self.packing, self.images.path(number))
        except UnreadableImage as error:
            return Encoded(number, b"", reason=error.reason)


def encode(content: bytes, number: int, packing: Packing, path: str) -> Encoded:
    """An image file, resized and encoded again.

    Args:
        content: of the file.
        number: of the image.
        packing: how.
        path: what errors call it.

    Raises:
        UnreadableImage: as of `decode_image`; files that are copied are decoded too. Or a side is longer
            than a JPEG may have.
    """
    side = packing.short_side
    if packing.copy_small:
        with unreadable_unless_good(path), open_image(content) as header:
            extension = _EXTENSIONS.get(str(header.format), str(header.format).lower())
            is_small = min(header.size) <= side
        if is_small:
            decode_image(content, path=path)
            return Encoded(number, content, extension, is_copy=True)
    image = decode_image(content, 3, min_side=2 * side, path=path)
    if min(image.size) > side:
        ratio = side / min(image.size)
        reduced = (max(side, round(image.width * ratio)), max(side, round(image.height * ratio)))
        image = image.resize(reduced, Image.Resampling.BICUBIC, reducing_gap=3)
    out = BytesIO()
    with unreadable_unless_good(path):
        if max(image.size) > _LONGEST:
            raise ValueError(f"{image.width} x {image.height} pixels are too long for a JPEG")
        image.save(out, "JPEG", quality=packing.quality)
    return Encoded(number, out.getvalue())

"""From the bytes of an image file to 8-bit pixels, upright, in the channels asked for."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

from fastjepa.data.transforms import Box, Corners, corners_of
from fastjepa.data.unreadable import UnreadableImage

# Only what folders of images hold: Pillow would hand a PostScript file to an outside program,
# whatever the file's name says.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
_JPEGS = ("JPEG", "MPO")  # MPO: several of them in a file

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
_FROM_RIGHT, _FROM_BOTTOM = (2, 3, 6, 7), (3, 4, 7, 8)  # where the file's first pixel then is
_FROM_MEMORY = re.compile(r" <_io\.BytesIO object at 0x[0-9a-f]+>")  # where Pillow names the file it read


class Crop(NamedTuple):
    """A part of a decoded image; its corners need not lie between pixels."""

    image: Image.Image
    corners: Corners


class Header(NamedTuple):
    """What a JPEG says before its pixels. Width and height are those of the upright image."""

    height: int
    width: int
    orientation: int  # of EXIF, 1 to 8
    mode: str  # Pillow's name of its kind of pixels


def decode_image(
    source: str | Path | bytes, channels: int = 3, min_side: int | None = None, path: str = ""
) -> Image.Image:
    """Read an image file.

    The EXIF orientation is applied; of several frames the first is taken; 16 bits are scaled to 8;
    what is transparent shows white, as on a page; colour profiles are ignored.

    Args:
        source: the file, or its content.
        channels: 3 for RGB, 1 for grey (ITU-R 601 luma).
        min_side: if given, a JPEG whose shorter side is at least twice that long may come
            reduced, by 2, 4 or 8, its sides still at least `min_side`: its decoder then skips
            most of the work (12 megapixels to half the side: 2.3 times faster, crop and resize
            included). At twice the side wanted in the end that is seen no more than the half
            pixel by which a crop of the reduced image may lie elsewhere.
        path: what errors call it, where `source` is its content.

    Returns:
        An image of mode "RGB" or "L", in memory.

    Raises:
        UnreadableImage: it is missing, empty, truncated, damaged, of another format, of
            a kind of pixel without a known white, or larger than Pillow's limit against
            decompression bombs.
    """
    name = path if isinstance(source, bytes) else str(source)
    with unreadable_unless_good(name), open_image(source) as image:
        if min_side is not None:
            image.draft(None, (min_side, min_side))
        image.load()
        return to_channels(upright(image), channels)


def decode_crop(
    content: bytes, path: str, channels: int, size: int, choose: Callable[[int, int], Box]
) -> Crop:
    """A part of an image, to be resized to `size` x `size`.

    Of a JPEG it comes reduced, by 2, 4 or 8, as long as the part stays at least as large as what it is
    resized to (libjpeg's scaled decoding). Where the part lies is chosen before, from the whole image's
    sides: reduced or not, it is the same part.

    Args:
        content: of the file.
        path: what errors call it.
        channels: 3 for RGB, 1 for grey.
        size: in pixels.
        choose: from height and width, upright, to the part.

    Raises:
        UnreadableImage: as of `decode_image`.
    """
    with unreadable_unless_good(path), open_image(content) as image:
        if image.format not in _JPEGS:
            image.load()  # only then is the orientation of some formats known
            whole = to_channels(upright(image), channels)
            return Crop(whole, corners_of(choose(whole.height, whole.width)))
        header = read_header(image)
        box = choose(header.height, header.width)
        scale, whole_width = draft_scale(box, size), image.width
        if scale > 1:
            drafted = image.draft(None, (image.width // scale, image.height // scale))
            scale = 1 if drafted is None else round(whole_width / drafted[1][2])
        image.load()
        reduced = to_channels(upright(image), channels)
        # A reduced pixel is `scale` of the whole's to a side, counted from where the file begins. Where EXIF
        # turns that side to the right or bottom, the last, incomplete one comes first.
        aside = reduced.width - header.width / scale if header.orientation in _FROM_RIGHT else 0.0
        below = reduced.height - header.height / scale if header.orientation in _FROM_BOTTOM else 0.0
        left, top = aside + box.left / scale, below + box.top / scale
        return Crop(reduced, Corners(left, top, left + box.width / scale, top + box.height / scale))


def draft_scale(box: Box, size: int) -> int:
    """The largest of 1, 2, 4, 8 that leaves a part no smaller than it is to be."""
    return next(s for s in (8, 4, 2, 1) if s == 1 or min(box.height, box.width) >= s * size)


@contextmanager
def unreadable_unless_good(path: str) -> Iterator[None]:
    """Whatever a decoder raises becomes an UnreadableImage of `path`."""
    try:
        yield
    except Exception as error:  # Pillow's decoders raise whatever their parsers trip over
        said = _FROM_MEMORY.sub("", str(error))
        raise UnreadableImage(path, f"{type(error).__name__}: {said}") from error


def open_image(source: str | Path | bytes) -> Image.Image:
    """Read its header."""
    return Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS)


def read_header(image: Image.Image) -> Header:
    """Of a JPEG that was opened and not yet loaded."""
    orientation = orientation_of(image)
    width, height = image.size[::-1] if orientation in _SIDEWAYS else image.size
    return Header(height, width, orientation, image.mode)


def orientation_of(image: Image.Image) -> int:
    """Of EXIF, 1 to 8; 1 where nothing good is said."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged tag block says nothing about the pixels
        return 1
    return orientation if orientation in _UPRIGHT else 1


def upright(image: Image.Image) -> Image.Image:
    orientation = orientation_of(image)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """As "RGB" or "L"."""
    mode = "RGB" if channels == 3 else "L"
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _from_16_bits(image)
    elif image.mode == "F":
        raise ValueError(
            "its pixels are floating-point numbers without a known white; save it with 8 or 16 bits"
        )
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert(mode)


def _from_16_bits(image: Image.Image) -> Image.Image:
    # Pillow's own convert("L") cuts everything above 255 off.
    values = np.asarray(image).astype(np.int64)  # [H, W]
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("its pixels are 32-bit integers without a known white; save it with 8 or 16 bits")
    return Image.fromarray(((values * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8))

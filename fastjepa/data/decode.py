"""From an image file to 8-bit pixels, upright, in the channels asked for."""

from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from fastjepa.data.unreadable import UnreadableImage

# Only what folders of images hold: Pillow would hand a PostScript file to an outside program,
# whatever the file's name says.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(path: str | Path, channels: int = 3, min_side: int | None = None) -> Image.Image:
    """Read an image file.

    The EXIF orientation is applied; of several frames the first is taken; 16 bits are scaled to 8;
    what is transparent shows white, as on a page; colour profiles are ignored.

    Args:
        path: the file.
        channels: 3 for RGB, 1 for grey (ITU-R 601 luma).
        min_side: if given, a JPEG whose shorter side is at least twice that long may come
            reduced, by 2, 4 or 8, its sides still at least `min_side`: its decoder then skips
            most of the work (12 megapixels to half the side: 2.3 times faster, crop and resize
            included). At `Augmentation.min_side` that is seen by the eye no more than the half
            pixel by which a crop of the reduced image may lie elsewhere.

    Returns:
        An image of mode "RGB" or "L", in memory.

    Raises:
        UnreadableImage: it is missing, empty, truncated, damaged, of another format, of
            a kind of pixel without a known white, or larger than Pillow's limit against
            decompression bombs.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if min_side is not None:
                image.draft(None, (min_side, min_side))
            image.load()
            return _to_channels(_upright(image), channels)
    except Exception as error:  # Pillow's decoders raise whatever their parsers trip over
        raise UnreadableImage(str(path), f"{type(error).__name__}: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged tag block says nothing about the pixels
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _to_channels(image: Image.Image, channels: int) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _from_16_bits(image)
    elif image.mode == "F":
        raise ValueError(
            "its pixels are floating-point numbers without a known white; save it with 8 or 16 bits"
        )
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB" if channels == 3 else "L")


def _from_16_bits(image: Image.Image) -> Image.Image:
    # Pillow's own convert("L") cuts everything above 255 off.
    values = np.asarray(image).astype(np.int64)  # [H, W]
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("its pixels are 32-bit integers without a known white; save it with 8 or 16 bits")
    return Image.fromarray(((values * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8))

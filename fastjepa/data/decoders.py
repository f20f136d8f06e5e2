"""From the bytes of an image file to a view, by one of several decoders: the same to within a level or so."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa.data.decode import (
    Header,
    decode_crop,
    draft_scale,
    open_image,
    read_header,
    unreadable_unless_good,
)
from fastjepa.data.resample import Part, cut_part, part_of
from fastjepa.data.transforms import Box, corners_of, view

Decoder = Literal["pillow", "torchvision"]
_LARGEST = 6  # times the view: from there on Pillow's way takes means first
Choose = Callable[[int, int], Box]  # from height and width to the part that is shown


class NoDecoder(ValueError):
    """The decoder that was asked for is not there; the message says what to install."""


def choose_decoder(name: Literal["auto", "pillow", "torchvision"]) -> Decoder:
    """The decoder of that name. `auto` is torchvision where it works, else Pillow.

    Raises:
        NoDecoder: torchvision was asked for by name, and is not installed or does not fit torch.
    """
    if name == "pillow":
        return name
    try:
        from torchvision.io import decode_jpeg  # noqa: F401
    except Exception as error:  # beside another torch than its own it raises whatever it likes
        if name == "auto":
            return "pillow"
        raise NoDecoder(
            f"speed.decoder torchvision cannot be used here ({type(error).__name__}: {error}): pip install "
            f"the torchvision that belongs to torch {torch.__version__}, or use speed.decoder=pillow"
        ) from error
    return "torchvision"


def read_view(
    content: bytes, path: str, channels: int, size: int, choose: Choose, flip: bool, decoder: Decoder
) -> Tensor:
    """A view of an image file, uint8 [C, size, size].

    `torchvision` decodes JPEGs and resizes them in torch's vectorised kernel. It sees no pixels beyond the
    part that is shown, so the outermost few of a view may differ from Pillow's by more than a level. Whatever
    else there is, and JPEGs that may come reduced, is Pillow's to read with either.

    Args:
        content: of the file.
        path: what errors call it.
        channels: 3 for RGB, 1 for grey.
        size: of the view, in pixels.
        choose: the part of the image that is shown.
        flip: mirrored.
        decoder: as `choose_decoder` gives it.

    Raises:
        UnreadableImage: as of `decode_image`.
    """
    if decoder == "torchvision":
        decoded = _whole_jpeg(content, path, channels, size, choose)
        if decoded is not None:
            return _resized(*decoded, size, flip)
    crop = decode_crop(content, path, channels, size, choose)
    return view(crop.image, crop.corners, size, flip)


def read_part(
    content: bytes, path: str, channels: int, size: int, choose: Choose, flip: bool, decoder: Decoder
) -> Part:
    """What a view of an image file is made of, to be resized elsewhere; arguments and errors as there."""
    if decoder == "torchvision":
        decoded = _whole_jpeg(content, path, channels, size, choose)
        if decoded is not None:
            pixels, box = decoded
            return cut_part(pixels, corners_of(box), size, flip)
    crop = decode_crop(content, path, channels, size, choose)
    return part_of(crop.image, crop.corners, size, flip)


def _whole_jpeg(
    content: bytes, path: str, channels: int, size: int, choose: Choose
) -> tuple[Tensor, Box] | None:
    """Upright uint8 [C, H, W], and the part of it; None if it is better left to Pillow."""
    with unreadable_unless_good(path):
        with open_image(content) as image:
            # MPO holds several, and CMYK has conventions of its own.
            if image.format != "JPEG" or image.mode not in ("RGB", "L"):
                return None
            header = read_header(image)
        box = choose(header.height, header.width)
        if draft_scale(box, size) > 1 or max(box.height, box.width) >= _LARGEST * size:
            return None
        return _upright(_decode(content, channels), header), box


def _decode(content: bytes, channels: int) -> Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg

    mode = ImageReadMode.RGB if channels == 3 else ImageReadMode.GRAY
    return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode)  # [C, H, W]


def _upright(pixels: Tensor, header: Header) -> Tensor:
    """Turned as EXIF says: 5 to 8 are 1 to 4 mirrored at the diagonal, of another order."""
    match header.orientation:
        case 2:
            return pixels.flip(2)
        case 3:
            return pixels.flip((1, 2))
        case 4:
            return pixels.flip(1)
        case 5:
            return pixels.transpose(1, 2)
        case 6:
            return pixels.transpose(1, 2).flip(2)
        case 7:
            return pixels.transpose(1, 2).flip((1, 2))
        case 8:
            return pixels.transpose(1, 2).flip(1)
    return pixels


def _cut(pixels: Tensor, box: Box) -> Tensor:
    return pixels[:, box.top : box.top + box.height, box.left : box.left + box.width]


def _resized(pixels: Tensor, box: Box, size: int, flip: bool) -> Tensor:
    # Pixel by pixel, and not channel by channel, is the layout that the kernel is vectorised for.
    cut = _cut(pixels, box)[None].contiguous(memory_format=torch.channels_last)
    resized = F.interpolate(cut, size=(size, size), mode="bicubic", antialias=True)[0]  # [C, size, size]
    return resized.flip(2) if flip else resized

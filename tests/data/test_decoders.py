"""One view, however it is decoded and wherever it is resized."""

import sys
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from fastjepa.data.decode import decode_crop, draft_scale
from fastjepa.data.decoders import NoDecoder, choose_decoder, read_part, read_view
from fastjepa.data.fashion_mnist import FashionMNIST
from fastjepa.data.folder import ImageFolder
from fastjepa.data.resample import bicubic_weights, collate, part_of
from fastjepa.data.transforms import (
    Augmentation,
    Box,
    Corners,
    choose_box,
    corners_of,
    draw,
    reduce,
    view,
)
from fastjepa.data.unreadable import UnreadableImage
from fastjepa.data.views import ImageSet, Reading, read_views
from tests.data.pictures import jpeg, photo, write_photos

CROP = Augmentation(crop_scale=(0.3, 1.0), flip_probability=0.5)
SIZE = 32
EDGE = 3  # pixels of a view in which the filter would see beyond the crop


def difference(a: Tensor, b: Tensor) -> Tensor:
    return (a.int() - b.int()).abs()


@st.composite
def boxes(draw: st.DrawFn) -> tuple[int, int, Box]:
    """Height and width of an image, and a part of it."""
    height, width = draw(st.integers(8, 150)), draw(st.integers(8, 150))
    top, left = draw(st.integers(0, height - 8)), draw(st.integers(0, width - 8))
    part = Box(top, left, draw(st.integers(8, height - top)), draw(st.integers(8, width - left)))
    return height, width, part


@settings(max_examples=60)
@given(boxes(), st.integers(1, 64), st.booleans())
def test_matrix_products_resize_as_pillow_does(
    image_and_box: tuple[int, int, Box], size: int, flip: bool
) -> None:
    height, width, box = image_and_box
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image, corners = Image.fromarray(noise), corners_of(box)
    crops, resampling = collate([part_of(image, corners, size, flip)], size)
    # One axis after the other, since Pillow itself takes the height first where that is less work.
    image, corners = reduce(image, corners, size)
    rows = image.resize(
        (size, image.height), Image.Resampling.BICUBIC, (corners.left, 0, corners.right, image.height)
    )
    expected = view(rows, Corners(0, corners.top, size, corners.bottom), size, flip)
    assert difference(resampling(crops)[0], expected).max() <= 1


def test_of_tall_photographs_too() -> None:
    image, corners = photo(60, 150), corners_of(Box(10, 5, 130, 50))
    crops, resampling = collate([part_of(image, corners, SIZE, False)], SIZE)
    apart = difference(resampling(crops)[0], view(image, corners, SIZE, flip=False))
    assert apart.max() <= 2
    assert apart.float().mean() < 0.5


@given(st.floats(0, 50), st.floats(0.5, 200), st.integers(1, 40), st.integers(0, 20), st.integers(1, 50))
def test_weights_sum_to_one_and_leave_padding_out(
    begin: float, length: float, size: int, padding: int, margin: int
) -> None:
    extent = int(begin + length) + margin
    weights = bicubic_weights(
        torch.tensor([begin], dtype=torch.float64),
        torch.tensor([begin + length], dtype=torch.float64),
        torch.tensor([extent]),
        extent + padding,
        size,
    )
    assert weights.shape == (1, size, extent + padding)
    torch.testing.assert_close(weights.sum(2), torch.ones(1, size), rtol=0, atol=1e-5)
    assert not weights[:, :, extent:].any()


def folder(path: Path) -> ImageFolder:
    """JPEGs of several sizes, one grey, one turned by EXIF, and a PNG."""
    write_photos(path, 12, width=90, height=70)
    photo(80, 60, 50).convert("L").save(path / "class_0" / "grey.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(80, 60, 51).save(path / "class_0" / "turned.jpg", exif=exif)
    photo(64, 96, 52).save(path / "class_0" / "drawn.png")
    photo(1000, 700, 53).save(path / "class_1" / "large.jpg")
    return ImageFolder(path)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    return folder(tmp_path_factory.mktemp("decoders"))


@pytest.mark.parametrize("decoder", ["pillow", "torchvision"])
@pytest.mark.parametrize("kept", [False, True])
def test_on_the_device_a_batch_is_what_it_is_on_the_cpu(
    images: ImageFolder, decoder: str, kept: bool
) -> None:
    if decoder == "torchvision":
        pytest.importorskip("torchvision")
    data: ImageSet = FashionMNIST() if kept else images
    index, choice = list(range(16)), choose_decoder(decoder)  # type: ignore[arg-type]
    here = read_views(data, index, SIZE, CROP, 1, 2, Reading("pillow"))
    there = read_views(data, index, SIZE, CROP, 1, 2, Reading(choice, "device"))
    assert there.resampling is not None
    views = there.resampling(there.pixels)
    assert views.shape == here.pixels.shape
    assert views.dtype == torch.uint8
    # Two decoders of one JPEG may round otherwise; the resize itself is within one.
    assert difference(views, here.pixels).max() <= (1 if decoder == "pillow" else 3)
    assert difference(views, here.pixels).float().mean() < 0.1
    assert torch.equal(views, there.resampling.to(torch.device("cpu"))(there.pixels))


def test_torchvision_gives_the_views_of_pillow(images: ImageFolder) -> None:
    pytest.importorskip("torchvision")
    index = list(range(16))
    pillow, vision = (
        read_views(images, index, SIZE, CROP, 1, 2, Reading(name)).pixels
        for name in ("pillow", "torchvision")
    )
    apart = difference(pillow, vision)
    assert not torch.equal(pillow, vision), "one was taken for the other"
    assert apart[..., EDGE:-EDGE, EDGE:-EDGE].max() <= 2
    assert apart.float().mean() < 0.5
    assert apart.max() < 40  # at the edges, where Pillow sees beyond the crop


@pytest.mark.parametrize("orientation", range(1, 9))
def test_torchvision_turns_as_pillow_does(orientation: int) -> None:
    pytest.importorskip("torchvision")
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = BytesIO()
    photo(60, 44).save(out, "JPEG", quality=95, exif=exif)
    whole = {
        name: read_view(out.getvalue(), "", 3, SIZE, lambda h, w: Box(3, 5, h - 8, w - 7), False, name)
        for name in ("pillow", "torchvision")
    }
    assert difference(whole["pillow"], whole["torchvision"]).float().mean() < 1


def test_torchvision_leaves_other_files_to_pillow() -> None:
    pytest.importorskip("torchvision")
    for mode, format in (("RGB", "PNG"), ("CMYK", "JPEG"), ("P", "GIF")):
        out = BytesIO()
        photo(60, 44).convert(mode).save(out, format)
        arguments = (out.getvalue(), "", 3, SIZE, partial(Box, 0, 0), True)
        assert torch.equal(read_view(*arguments, "torchvision"), read_view(*arguments, "pillow"))


@pytest.mark.parametrize("decoder", ["pillow", "torchvision"])
@pytest.mark.parametrize("harm", ["cut off", "empty", "no image"])
def test_a_damaged_file_is_unreadable_with_either(decoder: str, harm: str) -> None:
    if decoder == "torchvision":
        pytest.importorskip("torchvision")
    good = jpeg(60, 40)
    content = {"cut off": good[: len(good) // 2], "empty": b"", "no image": b"GIF89a"}[harm]
    for read in (read_view, read_part):
        with pytest.raises(UnreadableImage, match=r"^a\.jpg: ") as refusal:
            read(content, "a.jpg", 3, SIZE, lambda h, w: Box(0, 0, h, w), False, choose_decoder(decoder))  # type: ignore[arg-type]
        assert "0x" not in refusal.value.reason


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 512))
def test_a_crop_is_reduced_only_as_long_as_it_stays_as_large_as_its_view(
    height: int, width: int, size: int
) -> None:
    scale = draft_scale(Box(0, 0, height, width), size)
    assert scale == 1 or min(height, width) / scale >= size
    assert scale == 8 or min(height, width) / (2 * scale) < size


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_jpeg_gives_the_same_crop(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    # Smooth, so that a crop that lay elsewhere by a pixel would show.
    y, x = np.mgrid[0:701, 0:1003]
    smooth = np.stack([127 + 120 * np.sin(x / 90), 127 + 120 * np.cos(y / 70), (x + y) / 7], -1)
    out = BytesIO()
    Image.fromarray(smooth.astype(np.uint8)).save(out, "JPEG", quality=98, exif=exif)
    asked = []

    def choose(height: int, width: int) -> Box:
        asked.append((height, width))
        return Box(101, 57, 403, 395)

    crop = decode_crop(out.getvalue(), "", 3, 48, choose)
    whole = decode_crop(out.getvalue(), "", 3, 400, choose)
    assert asked == [(1003, 701) if orientation > 4 else (701, 1003)] * 2
    assert whole.image.width == asked[0][1]
    assert crop.image.width == -(-asked[0][1] // 8)
    views = [view(found.image, found.corners, 48, flip=False) for found in (crop, whole)]
    assert difference(*views).float().mean() < 1


def test_chance_chooses_the_same_part_of_a_reduced_image(tmp_path: Path) -> None:
    photo(900, 700).save(tmp_path / "a.jpg", quality=95)
    images, chance = ImageFolder(tmp_path), draw(CROP, 1, 2, torch.tensor([0]))[0]
    box = choose_box(700, 900, CROP, chance)
    expected = view(images.read(0), corners_of(box), SIZE, chance.flip)
    got = read_views(images, [0], SIZE, CROP, 1, 2).pixels[0]
    assert difference(got, expected).float().mean() < 4  # scaled decoding is another low-pass filter


def test_a_decoder_that_is_not_there_is_refused_and_auto_does_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.io", None)  # what Python takes for not importable
    with pytest.raises(NoDecoder, match=r"speed\.decoder torchvision cannot be used here .*pip install"):
        choose_decoder("torchvision")
    assert choose_decoder("auto") == "pillow"
    assert choose_decoder("pillow") == "pillow"

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastjepa.data.decode import decode_image
from fastjepa.data.unreadable import UnreadableImage

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def corners(width: int = 32, height: int = 16) -> Image.Image:
    """Red, green / blue, white in the four quarters, clockwise from the top left: no symmetry."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    image.paste(WHITE, (width // 2, height // 2, width, height))
    return image


def photo(width: int, height: int) -> Image.Image:
    """Smooth structure with some noise, as a photograph has."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (9 + 7 * c)) * np.cos(y / (13 + 5 * c)) for c in range(3)]
    noise = np.random.default_rng(0).normal(0, 4, (height, width, 3))
    return Image.fromarray(np.clip(128 + 90 * np.stack(waves, -1) + noise, 0, 255).astype(np.uint8))


def is_close(pixel: object, colour: tuple[int, ...], within: int = 12) -> bool:
    assert isinstance(pixel, tuple)
    return all(abs(a - b) <= within for a, b in zip(pixel, colour, strict=True))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif", "gif", "ppm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_formats(tmp_path: Path, suffix: str, channels: int) -> None:
    path = tmp_path / f"image.{suffix}"
    corners().save(path, quality=95)
    image = decode_image(path, channels)
    assert image.size == (32, 16)
    assert image.mode == {1: "L", 3: "RGB"}[channels]
    if channels == 3:
        assert is_close(image.getpixel((2, 2)), RED)
        assert is_close(image.getpixel((29, 2)), GREEN)
        assert is_close(image.getpixel((2, 13)), BLUE)
    else:
        assert abs(image.tobytes()[2 * 32 + 2] - 76) <= 6  # 0.299 of 255


def test_the_format_is_read_off_the_content_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "really_a_png.jpg"
    corners().save(path, format="PNG")
    assert decode_image(path).getpixel((0, 0)) == RED


def test_a_picture_of_several_gives_the_first(tmp_path: Path) -> None:
    second = Image.new("RGB", (32, 16))
    for name in ("stereo.jpg", "film.gif"):
        path = tmp_path / name
        format = "MPO" if name == "stereo.jpg" else None
        corners().save(path, format=format, save_all=True, append_images=[second])
        assert is_close(decode_image(path).getpixel((29, 13)), WHITE)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    # What must be stored for a viewer that honours the tag to see `corners()`.
    stored = {
        1: corners(),
        2: corners().transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: corners().transpose(Image.Transpose.ROTATE_180),
        4: corners().transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: corners().transpose(Image.Transpose.TRANSPOSE),
        6: corners().transpose(Image.Transpose.ROTATE_90),
        7: corners().transpose(Image.Transpose.TRANSVERSE),
        8: corners().transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    stored.save(path, exif=exif)
    assert decode_image(path).tobytes() == corners().tobytes()


def test_a_damaged_exif_block_does_not_cost_the_image(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    corners().save(path, exif=b"Exif\x00\x00this is no tag block")
    assert decode_image(path).size == (32, 16)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bits_are_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 128, 257, 20000, 32768, 65407, 65535]], dtype=np.uint16)
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(values).save(path)
    expected = [round(value / 257) for value in values[0].tolist()]
    assert list(decode_image(path, 1).tobytes()) == expected
    assert decode_image(path, 3).getpixel((3, 0)) == (78, 78, 78)


def test_pixels_without_a_known_white_are_refused(tmp_path: Path) -> None:
    for name, dtype, top in (("float.tif", np.float32, 0.5), ("deep.tif", np.int32, 2**20)):
        Image.fromarray(np.full((4, 4), top, dtype=dtype)).save(tmp_path / name)
        with pytest.raises(UnreadableImage, match="without a known white"):
            decode_image(tmp_path / name)


def test_cmyk(tmp_path: Path) -> None:
    path = tmp_path / "print.jpg"
    corners().convert("CMYK").save(path, quality=95)
    with Image.open(path) as stored:
        assert stored.mode == "CMYK"
    assert is_close(decode_image(path).getpixel((2, 2)), RED)
    assert is_close(decode_image(path).getpixel((29, 13)), WHITE)


def test_palette(tmp_path: Path) -> None:
    path = tmp_path / "palette.png"
    corners().quantize(4).save(path)
    image = decode_image(path)
    assert is_close(image.getpixel((2, 2)), RED)
    assert is_close(image.getpixel((2, 13)), BLUE)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((40, 40, 40, 255), (4, 0, 8, 8))
    path = tmp_path / "cut_out.png"
    if mode == "P":
        flat = image.convert("RGB").quantize(2)
        flat.save(path, transparency=flat.getpixel((0, 0)))
    else:
        image.convert(mode).save(path)
    assert is_close(decode_image(path).getpixel((0, 0)), WHITE, within=0)
    assert is_close(decode_image(path).getpixel((7, 7)), (40, 40, 40), within=1)


def test_half_transparent_is_half_white(tmp_path: Path) -> None:
    path = tmp_path / "glass.png"
    Image.new("RGBA", (2, 2), (0, 0, 0, 128)).save(path)
    assert decode_image(path).getpixel((0, 0)) == (127, 127, 127)


def test_black_and_white(tmp_path: Path) -> None:
    path = tmp_path / "fax.png"
    Image.new("1", (3, 3), 1).save(path)
    assert decode_image(path).getpixel((1, 1)) == WHITE


def jpeg_bytes(tmp_path: Path) -> bytes:
    path = tmp_path / "source.jpg"
    photo(64, 64).save(path)
    return path.read_bytes()


def test_a_truncated_file_is_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "half.jpg"
    content = jpeg_bytes(tmp_path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UnreadableImage, match="truncated") as refusal:
        decode_image(path)
    assert refusal.value.path == str(path)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\xff\xd8\xff", b"P6 0 0 255\n", b"GIF89a"])
def test_what_is_no_image_is_unreadable(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(UnreadableImage, match=r"broken\.jpg"):
        decode_image(path)


def test_a_missing_file_is_unreadable(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match="FileNotFoundError"):
        decode_image(tmp_path / "gone.jpg")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged tags
def test_flipped_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    chance = np.random.default_rng(1)
    path = tmp_path / "image.png"
    for suffix in ("png", "jpg", "tif", "gif", "webp"):
        photo(24, 24).save(path, format={"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()))
        content = np.frombuffer(path.read_bytes(), dtype=np.uint8)
        for _ in range(40):
            damaged = content.copy()
            damaged[chance.integers(len(damaged), size=4)] = chance.integers(256, size=4)
            path.write_bytes(damaged.tobytes())
            try:
                image = decode_image(path)
            except UnreadableImage:
                continue
            assert min(image.size) > 0


def test_a_decompression_bomb_is_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.png"
    Image.new("L", (200, 200)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(UnreadableImage, match="DecompressionBombError"):
        decode_image(path)


def test_postscript_is_not_handed_to_an_interpreter(tmp_path: Path) -> None:
    path = tmp_path / "page.png"
    corners().save(path, format="EPS")
    with pytest.raises(UnreadableImage, match="cannot identify"):
        decode_image(path)


def test_a_large_jpeg_comes_reduced_but_no_smaller_than_asked(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    photo(1200, 800).save(path, quality=95)
    assert decode_image(path).size == (1200, 800)
    assert decode_image(path, min_side=401).size == (1200, 800)
    assert decode_image(path, min_side=400).size == (600, 400)
    assert decode_image(path, min_side=100).size == (150, 100)
    assert decode_image(path, min_side=5000).size == (1200, 800)


def test_a_view_of_a_reduced_jpeg_is_nearly_that_of_the_whole(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    photo(1024, 1024).save(path, quality=95)
    whole, reduced = (
        np.asarray(decode_image(path, min_side=side).resize((224, 224)), dtype=float) for side in (None, 448)
    )
    assert np.sqrt(np.mean((whole - reduced) ** 2)) < 1.5  # of 255

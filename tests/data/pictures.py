"""Images that look like photographs to a codec, and the shards they are put into."""

import tarfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise of the spectrum of natural images: its amplitude falls as 1 / frequency."""
    chance = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    planes = []
    for _ in range(4):
        amplitude = (
            chance.normal(size=frequency.shape) + 1j * chance.normal(size=frequency.shape)
        ) / frequency
        plane = np.fft.irfft2(amplitude, s=(height, width))
        planes.append(plane / max(plane.std(), 1e-9))
    grey, *colours = planes
    pixels = 128 + 45 * np.stack([grey + 0.3 * colour for colour in colours], -1)  # [H, W, 3]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def jpeg(width: int = 60, height: int = 40, seed: int = 0, quality: int = 90) -> bytes:
    out = BytesIO()
    photo(width, height, seed).save(out, "JPEG", quality=quality)
    return out.getvalue()


def write_photos(folder: Path, count: int, classes: int = 2, width: int = 60, height: int = 40) -> Path:
    """JPEGs in class folders."""
    for number in range(count):
        path = folder / f"class_{number % classes}" / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(width + number % 7, height + number % 5, number))
    return folder


def write_shard(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, BytesIO(content))
    return path

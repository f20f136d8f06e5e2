"""JPEGs that cost a decoder what photographs do, since no photographs come with the package."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 500, 375  # of the median image of ImageNet-1k
CLASSES = 8


def photograph(seed: int, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Light and shade, texture and grain.

    The amplitudes of natural images fall as 1 / frequency (Field, 1987); contrast differs from place to
    place, as between sky and leaves, and colours vary less and more slowly than brightness.
    """
    chance = np.random.default_rng(seed)
    grey = _field(chance, height, width, slope=1.2)
    contrast = np.exp(0.7 * _field(chance, height, width, slope=2.0))
    texture = _field(chance, height, width, slope=0.8) * contrast
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    angle = chance.uniform(0, 2 * np.pi)
    light = np.cos(angle) * x + np.sin(angle) * y
    grain = chance.normal(size=(height, width))
    brightness = 120 + 45 * grey + 7 * texture + 40 * light + 1.5 * grain
    colours = [14 * _field(chance, height, width, slope=1.8) for _ in range(3)]
    pixels = np.stack([brightness + colour for colour in colours], -1)  # [H, W, 3]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _field(chance: np.random.Generator, height: int, width: int, slope: float) -> np.ndarray:
    """Noise of amplitude frequency ** -slope, of spread 1, [H, W]."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    noise = chance.normal(size=frequency.shape) + 1j * chance.normal(size=frequency.shape)
    plane = np.fft.irfft2(noise / frequency**slope, s=(height, width))
    return plane / plane.std()


def write_photographs(folder: Path, count: int, quality: int = 92) -> float:
    """Into class folders; the mean of their sizes in bytes."""
    total = 0
    for number in range(count):
        path = folder / f"class_{number % CLASSES}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        out = BytesIO()
        photograph(number).save(out, "JPEG", quality=quality)
        path.write_bytes(out.getvalue())
        total += len(out.getvalue())
    return total / count

"""Models to hand over: small, with no weight at 0 or 1, and no two networks alike."""

import subprocess
import sys
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastjepa.interop import LinearHead
from fastjepa.models import MAEDecoder, Predictor, VisionTransformer, ViTShape
from fastjepa.objectives import JEPA, MAE

Model = TypeVar("Model", JEPA, MAE)

WIDTH, DEPTH, CLASSES = 48, 2, 5


def shape(class_token: bool = False, channels: int = 3, image_size: tuple[int, int] = (16, 16)) -> ViTShape:
    # An MLP of 2.5 widths, and heads that are no power of two: nothing that a default would give.
    return ViTShape(image_size, 4, WIDTH, DEPTH, 3, 2.5, channels, class_token)


def jepa(channels: int = 3, image_size: tuple[int, int] = (16, 16)) -> JEPA:
    of = shape(channels=channels, image_size=image_size)
    statistics = ((0.4, 0.5, 0.6)[:channels], (0.2, 0.3, 0.25)[:channels])
    encoders = [VisionTransformer(of, *statistics) for _ in range(2)]
    return filled(JEPA(encoders[0], Predictor(of.grid, WIDTH, 16, 1, 2), encoders[1]))


def mae(
    channels: int = 3,
    image_size: tuple[int, int] = (16, 16),
    mask_ratio: float = 0.75,
    norm_pix_loss: bool = True,
) -> MAE:
    of = shape(True, channels, image_size)
    encoder = VisionTransformer(of, (0.4, 0.5, 0.6)[:channels], (0.2, 0.3, 0.25)[:channels])
    return filled(MAE(encoder, MAEDecoder(of, 16, 2, 2), mask_ratio, norm_pix_loss))


def filled(model: Model) -> Model:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def head(encoder: VisionTransformer) -> LinearHead:
    """A class for each of five images: what its features have that the others' have not."""
    with torch.no_grad():
        features = encoder(images(encoder.shape, CLASSES))[:, int(encoder.shape.class_token) :].mean(dim=1)
    weight = (features - features.mean(dim=0)) * 10  # [classes, D]
    names = ("bag", "boot", "coat", "dress", "shirt")
    return LinearHead(weight, -(weight @ features.mean(dim=0)) - 5 * weight.square().sum(dim=1) / 100, names)


def images(of: ViTShape, count: int = 4) -> Tensor:
    """uint8 [B, C, H, W]: noise in the dark and in the light, which an encoder tells apart."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.rand(count, of.channels, *of.image_size, generator=generator)
    light = torch.linspace(0, 1, count).view(-1, 1, 1, 1) if count > 1 else torch.tensor(0.5)
    return (255 * (0.3 * noise + 0.7 * light)).to(torch.uint8)


def picture(of: ViTShape, path: Path) -> Tensor:
    """Write a picture of the encoder's size: uint8 [1, C, H, W]."""
    pixels = images(of, 1)
    array = np.ascontiguousarray(pixels[0].permute(1, 2, 0).numpy())  # [H, W, C]
    Image.fromarray(array[:, :, 0] if of.channels == 1 else array).save(path)
    return pixels


WITHOUT_FASTJEPA = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"fastjepa", "fastjepa_kernels"}:
            raise ModuleNotFoundError(f"{name} is not for this process")

sys.meta_path.insert(0, Blocked())
try:
    import fastjepa
    sys.exit("fastjepa could be imported")
except ModuleNotFoundError:
    pass
"""


def run_alone(lines: str, folder: Path, blocked: bool = True) -> None:
    """Run lines of Python in `folder`, as a process that has nothing of ours to import, unless asked."""
    command = [sys.executable, "-I"] if blocked else [sys.executable]
    done = subprocess.run(
        [*command, "-c", (WITHOUT_FASTJEPA if blocked else "") + lines],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr

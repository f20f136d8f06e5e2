"""Pictures as other tools prepare them, beside what a run's probes see of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastjepa.data.decode import decode_image
from fastjepa.data.transforms import center_box, corners_of, view
from fastjepa.interop.huggingface import image_processor
from fastjepa.interop.loading import load_in_onnxruntime, load_tensors
from fastjepa.interop.portable import at_image_size
from fastjepa.interop.timm_vit import recipe_of
from fastjepa.models import VisionTransformer
from tests.interop.handing_over import jepa

SIDE = 16
LEVELS = 4  # of 255: filters round differently, and crops lie up to half a pixel apart


def picture(path: Path, mode: str) -> Path:
    """48 x 80 pixels, smooth, with nothing alike left and right, above and below."""
    down, across = np.mgrid[0:48, 0:80]
    pixels = np.stack([across * 3, down * 5, 255 - across - 2 * down], axis=2).clip(0, 255)  # [H, W, C]
    Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(path)
    return path


def probed(path: Path, channels: int = 3) -> Tensor:
    image = decode_image(path, channels)
    return view(image, corners_of(center_box(image.height, image.width)), SIDE, flip=False).float()


def levels(encoder: VisionTransformer, pixels: Tensor) -> Tensor:
    """0 to 255 again, of normalised pixels."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (encoder.pixel_mean, encoder.pixel_std))
    return (pixels * std + mean) * 255


@pytest.mark.parametrize(("mode", "suffix"), [("RGB", "png"), ("L", "png"), ("P", "png"), ("CMYK", "jpg")])
def test_the_image_processor_takes_every_kind_of_picture(mode: str, suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    encoder, path = jepa(image_size=(SIDE, SIDE)).encoder, picture(tmp_path / f"image.{suffix}", mode)
    pixels = image_processor(encoder)(Image.open(path), return_tensors="pt")["pixel_values"][0]
    assert (levels(encoder, pixels) - probed(path)).abs().max() <= LEVELS


def test_the_image_processor_is_one_that_crops_in_every_version(tmp_path: Path) -> None:
    """ViT's own does so only since transformers 5."""
    pytest.importorskip("transformers")
    image_processor(jepa(channels=1, image_size=(SIDE, SIDE)).encoder).save_pretrained(tmp_path)
    assert '"BitImageProcessor"' in (tmp_path / "preprocessor_config.json").read_text()


@pytest.mark.parametrize("lines", [load_tensors, lambda e, name: load_in_onnxruntime(e, None, name)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_lines_of_a_card_crop_as_probes_do(
    lines: object, channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = jepa(channels=channels, image_size=(SIDE, SIDE)).encoder
    path = picture(tmp_path / "image.png", "RGB")
    text = lines(encoder, "name").splitlines()  # type: ignore[operator]
    wanted = [line for line in text if line.startswith(("image =", "pixels =", "import numpy", "from PIL"))]
    monkeypatch.chdir(tmp_path)
    found: dict[str, np.ndarray] = {}
    exec("\n".join(wanted), found)
    difference = torch.from_numpy(found["pixels"][0].astype(np.float32)) - probed(path, channels)
    assert difference.abs().max() <= LEVELS


def test_timm_crops_for_a_square_encoder_and_squashes_for_another(tmp_path: Path) -> None:
    timm_data = pytest.importorskip("timm.data")
    encoder, path = jepa(image_size=(SIDE, SIDE)).encoder, picture(tmp_path / "image.png", "RGB")

    def prepared(of: VisionTransformer) -> Tensor:
        transform = timm_data.create_transform(**timm_data.resolve_data_config(recipe_of(of).pretrained_cfg))
        return levels(of, transform(Image.open(path)))

    assert (prepared(encoder) - probed(path)).abs().max() <= LEVELS
    wide = at_image_size(encoder, (SIDE, 2 * SIDE))
    whole = np.array(Image.open(path).resize((2 * SIDE, SIDE), Image.Resampling.BICUBIC))  # [H, W, C]
    assert (prepared(wide) - torch.from_numpy(whole).permute(2, 0, 1)).abs().max() <= LEVELS

import inspect

import pytest
import torch
from torch import Tensor

from fastjepa.masks import RandomMasks
from fastjepa.models import MAEDecoder, VisionTransformer, ViTShape
from fastjepa.objectives import MAE

SHAPE = ViTShape((16, 24), 4, width=32, depth=1, heads=1, class_token=True)
PATCHES = 24


def mae(mask_ratio: float = 0.75, norm_pix_loss: bool = True) -> MAE:
    torch.manual_seed(0)
    return MAE(VisionTransformer(SHAPE), MAEDecoder(SHAPE, 16, 1, 1), mask_ratio, norm_pix_loss)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 16, 24, generator=torch.Generator().manual_seed(1))


def test_what_others_call_has_these_arguments() -> None:
    parameters = inspect.signature(MAE.loss).parameters
    assert list(parameters)[:4] == ["self", "images", "noise", "norm_pix_loss"]
    assert parameters["noise"].default is None
    assert parameters["norm_pix_loss"].default is True


def test_a_step_is_the_loss_of_its_masks() -> None:
    model, drawn = mae(), RandomMasks(SHAPE.grid).sample(torch.arange(2))
    noise = torch.ones(2, PATCHES).scatter(1, drawn.context, 0.0)
    step = model.step(model.trainable(), images(), drawn)
    torch.testing.assert_close(step.loss, model.loss(images(), noise))
    assert step.hidden is not None
    assert step.hidden.shape == (2, 6, 32), "the class token is no patch"
    assert torch.equal(model.watched(step, images()), step.hidden)
    assert step.prediction.shape == (2, PATCHES, 48)
    assert not step.hidden.requires_grad
    assert not step.prediction.requires_grad
    step.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_step_compares_with_the_pixels_asked_for() -> None:
    drawn = RandomMasks(SHAPE.grid).sample(torch.arange(2))
    normed, plain = (mae(norm_pix_loss=choice) for choice in (True, False))
    pixels = 3 + images()
    assert normed.step(normed, pixels, drawn).loss < plain.step(plain, pixels, drawn).loss
    noise = torch.ones(2, PATCHES).scatter(1, drawn.context, 0.0)
    torch.testing.assert_close(plain.step(plain, pixels, drawn).loss, plain.loss(pixels, noise, False))


def test_what_is_seen_does_not_count() -> None:
    model, noise = mae(), torch.arange(PATCHES).expand(2, -1) / PATCHES
    painted = {}
    for name, pixels in (("as it is", images()), ("seen", images()), ("hidden", images())):
        pixels[:, :, :4, :8] += 1 if name == "seen" else 0  # the first two of six seen patches
        pixels[:, :, 12:] *= 2 if name == "hidden" else 1  # the last row of patches, all hidden
        _, prediction, _ = model(pixels, torch.arange(6).expand(2, -1), torch.arange(6, 24).expand(2, -1))
        painted[name] = prediction, float(model.loss(pixels, noise, norm_pix_loss=False).detach())
    assert torch.equal(painted["hidden"][0], painted["as it is"][0]), "the encoder saw what is hidden"
    assert not torch.equal(painted["seen"][0], painted["as it is"][0])
    assert painted["hidden"][1] != painted["as it is"][1]


@pytest.mark.parametrize(("mask_ratio", "kept"), [(0.75, 6), (0.5, 12), (0.8, 4)])
def test_the_patches_with_the_least_noise_are_seen(mask_ratio: float, kept: int) -> None:
    model, noise = mae(mask_ratio=mask_ratio), torch.rand(2, PATCHES)
    order = noise.argsort(dim=1)
    expected = model(images(), order[:, :kept], order[:, kept:])[0]
    torch.testing.assert_close(model.loss(images(), noise), expected)
    assert model.loss(images()).isfinite()


def test_a_model_in_bf16_is_compared_with_pixels_in_fp32() -> None:
    model = mae().bfloat16()
    with torch.no_grad():
        for parameter in model.decoder.decoder_pred.parameters():  # type: ignore[union-attr]
            parameter.zero_()
    pixel = 1 + 2**-9  # 1 in bf16
    loss = model.loss(torch.full((2, 3, 16, 24), pixel), norm_pix_loss=False)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor(pixel**2), rtol=1e-6, atol=0)


def test_bytes_are_pixels_too() -> None:
    raw, noise = torch.randint(256, (2, 3, 16, 24), dtype=torch.uint8), torch.rand(2, PATCHES)
    mean, std = torch.tensor(mae().encoder.pixel_mean), torch.tensor(mae().encoder.pixel_std)
    normalised = (raw / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(mae().loss(raw, noise), mae().loss(normalised, noise), rtol=1e-5, atol=0)


def test_what_is_missing_or_misshapen_is_named() -> None:
    with pytest.raises(ValueError, match="no decoder to reconstruct pixels with"):
        MAE(VisionTransformer(SHAPE), None).loss(images())
    with pytest.raises(ValueError, match=r"noise must be \[B, N\] = \[2, 24\], got \[2, 20\]"):
        mae().loss(images(), torch.rand(2, 20))

"""The encoder in fp8 against the same weights in float64, by the path that a device without fp8 takes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastjepa_kernels as fk
from fastjepa.models import VisionTransformer, ViTShape
from fastjepa.models.fp8 import Fp8Encoder

SHAPE = ViTShape(image_size=(32, 48), patch_size=8, width=64, depth=4, heads=2)
PATCHES = 24
# e4m3 is off by 2**-4 at most and by about 2.6 % in the mean square, in both factors of a GEMM: 3.6 %. Each
# of the four blocks adds what two such GEMMs in a row give, of what those before it have added.
HIDDEN = 0.1  # of the norm of what the blocks add to the stream; measured: 0.064
TARGET = 0.1  # of the norm of the layer-normed target
LOSS = 0.005  # of the loss


def encoder(shape: ViTShape = SHAPE) -> VisionTransformer:
    """In bf16, with weights that leave no bias at 0 and no norm at 1, and attention that is not uniform."""
    torch.manual_seed(0)
    model = VisionTransformer(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    return model.bfloat16().requires_grad_(False)


def images(batch: int) -> Tensor:
    return torch.randint(256, (batch, 3, *SHAPE.image_size), dtype=torch.uint8)


def error(out: Tensor, exact: Tensor, over: Tensor) -> float:
    return float((out.double() - exact).norm() / over.norm())


def layer_normed(model: VisionTransformer, hidden: Tensor) -> Tensor:
    return F.layer_norm(model.norm(hidden), (SHAPE.width,))


@pytest.mark.parametrize("class_token", [False, True])
def test_it_is_near_the_encoder_in_float64(class_token: bool) -> None:
    shape = ViTShape(**{**SHAPE.__dict__, "class_token": class_token})
    model, batch = encoder(shape), images(3)
    exact_model = copy.deepcopy(model).double()
    exact = exact_model(batch, final_norm=False)
    hidden = Fp8Encoder(model, emulate=True).hidden(batch)
    assert hidden.dtype == torch.bfloat16
    assert hidden.shape == exact.shape == (3, PATCHES + class_token, 64)
    added = exact - exact_model.embed(batch)[0].view_as(exact)
    assert error(hidden, exact, added) < HIDDEN
    target = layer_normed(exact_model, exact)
    assert error(layer_normed(exact_model, hidden.double()), target, target) < TARGET

    index = torch.stack([torch.randperm(PATCHES)[:5] for _ in range(6)]).view(2, 3, 5)
    prediction = torch.randn(2, 3, 5, 64, dtype=torch.float64)
    norm = exact_model.norm
    losses = [fk.jepa_loss(prediction, h, index, norm.weight, norm.bias) for h in (hidden.double(), exact)]
    torch.testing.assert_close(losses[0], losses[1], rtol=LOSS, atol=0)

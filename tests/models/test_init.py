import math

import pytest
import torch
from torch import Tensor, nn

from fastjepa.models import Init, MAEDecoder, Predictor, VisionTransformer, ViTShape, initialise

SHAPE = ViTShape((16, 16), 4, 192, 1, 3, class_token=True)


def initialised(scheme: Init, seed: int = 0) -> nn.ModuleDict:
    """An encoder, a predictor and a decoder whose weights were not numbers before."""
    model = nn.ModuleDict(
        {
            "encoder": VisionTransformer(SHAPE),
            "predictor": Predictor((4, 4), 192, 96, 1, 3),
            "decoder": MAEDecoder(SHAPE, 96, 1, 3),
        }
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    initialise(model, scheme, torch.Generator().manual_seed(seed))
    return model


def assert_normal(tensor: Tensor, std: float) -> None:
    """Mean, deviation and fourth moment within five errors of a normal distribution's."""
    tensor, n = tensor.detach(), tensor.numel()
    assert abs(float(tensor.mean())) < 5 * std / n**0.5
    assert abs(float(tensor.std()) / std - 1) < 5 / (2 * n) ** 0.5
    assert abs(float((tensor / std).pow(4).mean()) - 3) < 5 * 96**0.5 / n**0.5


@pytest.mark.parametrize("scheme", ["published", "xavier"])
def test_every_weight_is_filled_as_the_scheme_says(scheme: Init) -> None:
    model = initialised(scheme)
    seen = set()
    for name, module in model.named_modules():
        match module:
            case nn.LayerNorm():
                assert bool((module.weight == 1).all())
                assert bool((module.bias == 0).all())
            case nn.Linear() | nn.Conv2d():
                assert module.bias is not None
                assert bool((module.bias == 0).all())
                fan_out, fan_in = module.weight.flatten(1).shape
                if scheme == "published":
                    assert_normal(module.weight, 0.02)
                elif isinstance(module, nn.Conv2d):
                    assert_normal(module.weight, fan_in**-0.5)
                else:
                    bound = math.sqrt(6 / (fan_in + fan_out))
                    assert 0.99 * bound < float(module.weight.detach().abs().max()) <= bound
                    # The square of a uniform number has mean 1/3 and variance 4/45 of the bound's.
                    error = (4 / 45 / module.weight.numel()) ** 0.5
                    assert abs(float((module.weight.detach() / bound).square().mean()) - 1 / 3) < 5 * error
            case _:
                continue
        seen |= {f"{name}.{part}" for part, _ in module.named_parameters()}
    tokens = {"encoder.cls_token", "predictor.mask_token", "decoder.mask_token"}
    for name in tokens:
        assert_normal(model.get_parameter(name), 0.02)
    assert seen | tokens == {name for name, _ in model.named_parameters()}


def test_the_generator_alone_decides() -> None:
    torch.manual_seed(1)
    one = initialised("xavier").state_dict()
    torch.manual_seed(2)
    other = initialised("xavier").state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    different = initialised("xavier", seed=1).state_dict()
    assert not torch.equal(one["encoder.cls_token"], different["encoder.cls_token"])


def test_positions_are_left_alone() -> None:
    model = initialised("published")
    assert torch.equal(model.get_buffer("encoder.pos_embed"), VisionTransformer(SHAPE).pos_embed)

"""The encoder in fp8 against the same weights in float64, by the path that a device without fp8 takes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

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


def test_at_some_rows_it_is_the_slice() -> None:
    model, batch = Fp8Encoder(encoder(), emulate=True), images(3)
    rows = torch.randint(3 * PATCHES, (17,))  # in any order, and some twice
    out = model.hidden(batch, rows)
    assert out.shape == (17, 64)
    torch.testing.assert_close(out, model.hidden(batch).flatten(0, 1)[rows])


def test_the_last_block_multiplies_at_those_rows_alone() -> None:
    model, batch = Fp8Encoder(encoder(), emulate=True), images(3)
    width, rows = 64, torch.arange(9)
    with FlopCounterMode(display=False) as everything:
        model.hidden(batch)
    with FlopCounterMode(display=False) as some:
        model.hidden(batch, rows)
    saved = 3 * PATCHES - len(rows)
    assert everything.get_total_flops() - some.get_total_flops() == 2 * saved * width * width * (1 + 4 + 4)


def test_it_counts_the_products_of_the_encoder() -> None:
    source, batch = encoder(), images(2)
    with FlopCounterMode(display=False) as exact:
        source(batch, final_norm=False)
    with FlopCounterMode(display=False) as counted:
        Fp8Encoder(source, emulate=True).hidden(batch)
    assert counted.get_total_flops() == exact.get_total_flops()


def flatten(model: VisionTransformer) -> Tensor:
    """Make the blocks' weights views of one buffer, as an engine has them."""
    weights = [p for p in model.blocks.parameters() if p.ndim == 2]
    flat = torch.cat([weight.flatten() for weight in weights])
    for weight, part in zip(weights, flat.split([w.numel() for w in weights]), strict=True):
        weight.data = part.view_as(weight)
    return flat


def test_refreshing_follows_the_weights_and_nothing_else_does() -> None:
    source, batch = encoder(), images(2)
    model = Fp8Encoder(source, emulate=True)
    before = model.hidden(batch)
    with torch.no_grad():
        for parameter in source.blocks.parameters():
            if parameter.ndim == 2:
                parameter.mul_(1.5)
    assert torch.equal(model.hidden(batch), before)
    model.refresh()
    after = model.hidden(batch)
    assert not torch.equal(after, before)
    assert torch.equal(after, Fp8Encoder(copy.deepcopy(source), emulate=True).hidden(batch))


def test_weights_that_lie_end_to_end_are_quantised_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    source, batch = encoder(), images(2)
    expected = Fp8Encoder(source, emulate=True).hidden(batch)
    flat, launches = flatten(source), []
    quantize = fk.quantize_rows_
    model = Fp8Encoder(source, emulate=True)

    def counted(x: Tensor, out: Tensor, scale: Tensor) -> None:
        launches.append(list(x.shape))
        quantize(x, out, scale)

    monkeypatch.setattr(fk, "quantize_rows_", counted)
    flat.mul_(2)  # exact, and taken in where the weights are views
    model.refresh()
    assert launches == [[8 * 64, 64]] * 4 + [[64, 256]] * 4  # qkv, proj and fc1; fc2
    flat.div_(2)
    model.refresh()
    monkeypatch.undo()
    assert torch.equal(model.hidden(batch), expected)


def test_an_mlp_of_an_odd_width_stays_in_bf16() -> None:
    shape = ViTShape((32, 48), 8, width=64, depth=2, heads=2, mlp_ratio=2.125)  # 136 is no multiple of 16
    source, batch = encoder(shape), images(2)
    exact = copy.deepcopy(source).double()(batch, final_norm=False)
    model = Fp8Encoder(source, emulate=True)
    assert error(model.hidden(batch), exact, exact) < HIDDEN
    rows = torch.tensor([5, 0, 40])
    torch.testing.assert_close(model.hidden(batch, rows), model.hidden(batch).flatten(0, 1)[rows])


def test_what_it_cannot_do_is_said_at_once() -> None:
    with pytest.raises(ValueError, match=r"no fp8 matrix products: cpu.*sm_89"):
        Fp8Encoder(encoder())
    with pytest.raises(ValueError, match=r"made from one in bfloat16, got torch\.float32"):
        Fp8Encoder(encoder().float(), emulate=True)
    with pytest.raises(ValueError, match="a multiple of 16, got 24"):
        Fp8Encoder(encoder(ViTShape((32, 48), 8, 24, 1, 1)), emulate=True)


def test_there_is_no_gradient() -> None:
    source = encoder().requires_grad_(True)
    assert not Fp8Encoder(source, emulate=True).hidden(images(1)).requires_grad

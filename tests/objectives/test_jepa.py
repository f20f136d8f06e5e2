import inspect

import pytest
import torch
from torch import Tensor

from fastjepa.masks import Masks, MultiBlockMasks
from fastjepa.models import Predictor, VisionTransformer, ViTShape
from fastjepa.objectives import JEPA

SHAPE = ViTShape((24, 24), 4, width=32, depth=1, heads=1)


def jepa(dtype: torch.dtype = torch.float32) -> JEPA:
    torch.manual_seed(0)
    return JEPA(VisionTransformer(SHAPE), Predictor(SHAPE.grid, 32, 16, 1, 1)).to(dtype)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def masks(mode: str = "truncate") -> Masks:
    return MultiBlockMasks(SHAPE.grid, mode).sample(torch.arange(2))  # type: ignore[arg-type]


def test_what_others_call_has_these_arguments() -> None:
    wanted = ["self", "images", "context_index", "target_index", "cu_seqlens"]
    for method in (JEPA.loss, JEPA.predict):
        parameters = inspect.signature(method).parameters
        assert list(parameters)[:5] == wanted
        assert parameters["cu_seqlens"].default is None
    assert list(inspect.signature(JEPA.update_target).parameters)[:2] == ["self", "momentum"]


@pytest.mark.parametrize("mode", ["truncate", "budget", "packed"])
def test_every_mode_of_masks_can_be_learned_from(mode: str) -> None:
    model, drawn = jepa(), masks(mode)
    prediction = model.predict(images(), drawn.context, drawn.targets, drawn.cu_seqlens)
    assert prediction.shape == (*drawn.targets.shape, 32)
    model.loss(images(), drawn.context, drawn.targets, drawn.cu_seqlens).backward()
    for name, parameter in model.named_parameters():
        is_target = name.startswith("target_encoder.")
        assert parameter.requires_grad is not is_target
        assert (parameter.grad is None) is is_target


def test_a_step_goes_through_the_network_given() -> None:
    model, drawn, seen = jepa(), masks(), []

    def network(*arguments: Tensor) -> Tensor:
        seen.append(arguments)
        return model.trainable()(*arguments)

    pixels = images()
    step = model.step(network, pixels, drawn)
    assert len(seen) == 1
    assert seen[0][0] is pixels
    assert torch.equal(step.loss, model.loss(pixels, drawn.context, drawn.targets))
    assert torch.equal(step.prediction, model.predict(pixels, drawn.context, drawn.targets))
    watched = model.watched(step, pixels)
    assert torch.equal(model.target_encoder.norm(watched), model.target_encoder(pixels))
    assert not watched.requires_grad
    assert step.loss.requires_grad
    assert not step.prediction.requires_grad


def test_the_target_encoder_starts_as_the_encoder_and_apart_from_it() -> None:
    model = jepa()
    for ours, theirs in zip(model.encoder.parameters(), model.target_encoder.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()
    shared = {id(parameter) for parameter in model.trainable().parameters()}
    assert shared == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


@pytest.mark.parametrize("momentum", [0.75, torch.tensor(0.75)])
def test_the_target_follows_by_momentum_over_the_parameters_alone(momentum: float | Tensor) -> None:
    model = jepa()
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(1)
        model.encoder.pos_embed.add_(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.update_target(momentum)
    for name, tensor in model.state_dict().items():
        if name.startswith("target_encoder.") and not name.endswith("pos_embed"):
            torch.testing.assert_close(tensor, before[name] + 0.25, rtol=0, atol=1e-6)
        else:
            assert torch.equal(tensor, before[name]), "tables and the student stay"


def test_the_loss_is_taken_in_fp32_of_a_model_in_bf16() -> None:
    drawn = masks()
    loss = jepa(torch.bfloat16).loss(images(), drawn.context, drawn.targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, jepa().loss(images(), drawn.context, drawn.targets), rtol=0.05, atol=0)


def test_positions_outside_the_grid_are_refused() -> None:
    drawn = masks()
    for context, targets in ((drawn.context + 36, drawn.targets), (drawn.context, drawn.targets - 36)):
        with pytest.raises(ValueError, match=r"index must lie in 0\.\.35"):
            jepa().loss(images(), context, targets)

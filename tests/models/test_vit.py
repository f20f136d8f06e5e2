from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from fastjepa.models import VisionTransformer, ViTShape
from fastjepa.models.block import Block

SHAPE = ViTShape(image_size=(16, 24), patch_size=4, width=48, depth=2, heads=2)
PATCHES = 24


def encoder(shape: ViTShape = SHAPE, dtype: torch.dtype = torch.float64) -> VisionTransformer:
    """With weights that leave no bias at 0 and no norm at 1."""
    torch.manual_seed(0)
    model = VisionTransformer(shape).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    return model


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, *SHAPE.image_size, generator=torch.Generator().manual_seed(1)).double()


def test_all_patches_are_those_in_order() -> None:
    model = encoder()
    everything = torch.arange(PATCHES).expand(2, -1)
    assert torch.equal(model(images(2)), model(images(2), everything))


@pytest.mark.parametrize("head_dim", [24, 32, 64, 80, 88, 128])
def test_packed_is_dense(head_dim: int) -> None:
    model = encoder(ViTShape((16, 24), 4, width=2 * head_dim, depth=2, heads=2))
    index = torch.stack([torch.randperm(PATCHES)[:7] for _ in range(3)])
    starts = torch.arange(4, dtype=torch.int32) * 7
    dense = model(images(3), index)
    packed = model(images(3), index.flatten(), starts)
    torch.testing.assert_close(packed.view(3, 7, -1), dense, rtol=1e-10, atol=1e-11)
    wanted = torch.autograd.grad(dense.square().mean(), list(model.parameters()))
    got = torch.autograd.grad(packed.square().mean(), list(model.parameters()))
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-11)


def test_packed_images_are_as_if_alone() -> None:
    model, lengths = encoder(), [5, 0, 1, 24]
    contexts = [torch.randperm(PATCHES)[:length].sort().values for length in lengths]
    starts = torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32)
    packed = model(images(4), torch.cat(contexts), starts)
    assert packed.shape == (30, 48)
    for image, out in enumerate(packed.split(lengths)):
        alone = model(images(4)[image : image + 1], contexts[image][None])[0]
        torch.testing.assert_close(out, alone, rtol=1e-10, atol=1e-11)

    longer = torch.cat([*contexts, torch.tensor([3, 9])])  # rows past the end change nothing
    torch.testing.assert_close(model(images(4), longer, starts)[:30], packed)


def test_bytes_are_normalised_by_the_model_and_floats_are_taken_as_they_are() -> None:
    model = VisionTransformer(SHAPE, pixel_mean=(0.1, 0.2, 0.3), pixel_std=(0.4, 0.5, 0.6)).double()
    raw = torch.randint(256, (2, 3, 16, 24), dtype=torch.uint8)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).double(), torch.tensor([0.4, 0.5, 0.6]).double()
    normalised = (raw.double() / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(model(raw), model(normalised), rtol=1e-6, atol=1e-6)
    index = torch.tensor([[3, 7], [0, 23]])
    torch.testing.assert_close(model(raw, index), model(normalised, index), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_the_whole_encoder_compiles_as_one_graph(packed: bool) -> None:
    torch._dynamo.reset()
    model = encoder()
    index = torch.tensor([[0, 5, 9], [1, 2, 3]])
    arguments = (index.flatten(), torch.tensor([0, 3, 6], dtype=torch.int32)) if packed else (index,)
    expected = model(images(2), *arguments)
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(images(2), *arguments)
    torch.testing.assert_close(found, expected)
    weights = list(model.parameters())
    gradients = [torch.autograd.grad(out.square().sum(), weights) for out in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_an_encoder_without_memory_has_shapes() -> None:
    model, index = VisionTransformer(SHAPE).to("meta"), torch.zeros(2, 5, dtype=torch.int64, device="meta")
    out = model(torch.empty(2, 3, *SHAPE.image_size, device="meta"), index)
    assert out.shape == (2, 5, 48)
    assert out.is_meta
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_final_norm_can_be_left_to_the_caller() -> None:
    model = encoder()
    torch.testing.assert_close(model.norm(model(images(2), final_norm=False)), model(images(2)))


@pytest.mark.parametrize("packed", [False, True])
def test_checkpointing_computes_blocks_again_and_gives_the_same_gradients(
    packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = encoder()
    index = torch.tensor([[0, 5, 9], [1, 2, 3]])
    starts = torch.tensor([0, 3, 6], dtype=torch.int32) if packed else None
    calls, block = [], model.blocks.blocks()[0]
    begin = block.begin

    def counted(x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return begin(x, delta)

    monkeypatch.setattr(block, "begin", counted)
    gradients = []
    for model.blocks.recompute, expected_calls in ((False, 1), (True, 3)):
        out = model(images(2), index.flatten() if packed else index, starts)
        gradients.append(torch.autograd.grad(out.square().mean(), list(model.parameters())))
        assert len(calls) == expected_calls
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    with torch.no_grad():
        model(images(2))
    assert len(calls) == 4, "without gradient there is nothing to compute again"


def test_a_class_token_comes_first_and_needs_equal_lengths() -> None:
    model = encoder(ViTShape((16, 24), 4, 48, 1, 2, class_token=True))
    assert model.pos_embed.shape == (1, 25, 48)
    out = model(images(2), torch.tensor([[3, 4], [0, 1]]))
    assert out.shape == (2, 3, 48)
    swapped = model(images(2), torch.tensor([[4, 3], [1, 0]]))
    torch.testing.assert_close(swapped[:, [0, 2, 1]], out)
    with pytest.raises(ValueError, match="class token needs contexts of equal length"):
        model(images(1), torch.tensor([3]), torch.tensor([0, 1], dtype=torch.int32))


@pytest.mark.parametrize(
    ("size", "nearest"), [((225, 224), "224 x 224"), ((232, 8), "224 x 16|240 x 16"), ((0, 16), "16 x 16")]
)
def test_images_of_parts_of_patches_are_refused(size: tuple[int, int], nearest: str) -> None:
    with pytest.raises(ValueError, match=nearest):
        ViTShape(size, 16, 64, 1, 1)


@pytest.mark.parametrize("shape", [(1, 3, 24, 16), (1, 1, 16, 24), (3, 16, 24), (1, 3, 32, 24)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"takes images of \[B, 3, 16, 24\]"):
        encoder()(torch.zeros(shape))


@pytest.mark.parametrize("arguments", [{"pixel_mean": (0.5,)}, {"pixel_std": (0.5,) * 4}])
def test_means_are_one_for_each_channel(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"pixel_(mean|std) has . values for 3 channels"):
        VisionTransformer(SHAPE, **arguments)


@pytest.mark.parametrize(("width", "heads"), [(48, 5), (48, 4)])
def test_heads_must_fit_the_width(width: int, heads: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of 8, got {width} / {heads}"):
        Block(width, heads)

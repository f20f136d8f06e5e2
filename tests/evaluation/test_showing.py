"""What a snapshot shows, from real patches and small encoders: searches, pictures, attention."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastjepa.data.fashion_mnist import FashionMNIST
from fastjepa.evaluation import nearest
from fastjepa.evaluation.attention import attended, last_attention
from fastjepa.evaluation.bank import Bank, read_bank
from fastjepa.evaluation.nearest import nearest_rows
from fastjepa.evaluation.painting import correlation, paint
from fastjepa.evaluation.patchwork import cut, fill, join, shrink, surroundings
from fastjepa.evaluation.retrieval import compare, neighbours, retrieve
from fastjepa.evaluation.showing import Showing, showing_of
from fastjepa.models import VisionTransformer, ViTShape, initialise


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def encoder(class_token: bool) -> VisionTransformer:
    shape = ViTShape((28, 28), 4, width=32, depth=2, heads=2, channels=1, class_token=class_token)
    made = VisionTransformer(shape, (0.29,), (0.35,))
    initialise(made, "xavier", torch.Generator().manual_seed(0))
    return made


@settings(deadline=None)
@given(
    seed=st.integers(0, 99), queries=st.integers(1, 6), bank=st.integers(1, 40), at_once=st.integers(1, 60),
    data=st.data(),
)  # fmt: skip
def test_nearest_rows_are_those_of_brute_force(
    seed: int, queries: int, bank: int, at_once: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, bank))
    q, r, centre = rows(seed, queries, 5), rows(seed + 1, bank, 5), rows(seed + 2, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest, "_SIMILARITIES_AT_ONCE", at_once)  # so that the bank comes in parts
        found = nearest_rows(q, r, k, centre)
    similarity = F.cosine_similarity((q - centre)[:, None], (r - centre)[None], dim=2)
    assert torch.equal(found, similarity.argsort(dim=1, descending=True)[:, :k])


@pytest.mark.parametrize("k", [0, 4])
def test_more_neighbours_than_rows_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match="give a k of 1 to 3"):
        nearest_rows(rows(0, 2, 5), rows(1, 3, 5), k)


@given(
    down=st.integers(1, 4),
    across=st.integers(1, 4),
    patch=st.integers(1, 4),
    channels=st.sampled_from([1, 3]),
)
def test_cut_images_are_joined_again(down: int, across: int, patch: int, channels: int) -> None:
    images = rows(0, 2, channels, down * patch, across * patch)
    patches = cut(images, patch)
    assert torch.equal(join(patches, (down, across)), images)
    last = patches[1, -1]
    assert torch.equal(last, images[1, :, -patch:, -patch:])


@given(data=st.data())
def test_each_patch_is_filled_with_what_the_first_block_found(data: st.DataObject) -> None:
    patches = torch.zeros(2, 9, 1, 2, 2)
    lists = st.lists(st.integers(0, 8), min_size=3, max_size=3, unique=True)
    places = torch.tensor(
        data.draw(st.lists(st.lists(lists, min_size=2, max_size=2), min_size=1, max_size=3))
    )
    found = torch.arange(1.0, places.numel() + 1).view(*places.shape, 1, 1, 1).expand(-1, -1, -1, 1, 2, 2)
    filled = fill(patches, places, found)
    for image in range(2):
        for place in range(9):
            named = (places[:, image] == place).nonzero().tolist()
            expected = found[named[0][0], image, named[0][1]] if named else patches[image, place]
            assert torch.equal(filled[image, place], expected)


def test_surroundings_are_centred_and_grey_outside() -> None:
    image = torch.arange(64, dtype=torch.uint8).view(1, 8, 8)
    corner = surroundings(image, 0, 2)
    assert torch.equal(corner[:, 2:, 2:], image[:, :4, :4])
    assert bool((corner[:, :2] == 128).all())
    assert torch.equal(surroundings(image, 5, 2), image[:, :6, :6])


def test_shrinking_takes_means_and_never_enlarges() -> None:
    image = torch.tensor([[[0, 100], [100, 200]]], dtype=torch.uint8)
    assert shrink(image, 1).tolist() == [[[100]]]
    assert shrink(image, 2) is image


@settings(deadline=None)
@given(seed=st.integers(0, 99), share=st.floats(0, 1))
def test_cosines_are_bounded_and_tell_a_mean_from_a_prediction(seed: int, share: float) -> None:
    tokens, mean = rows(seed, 3, 4, 8), rows(seed + 1, 4, 8)
    targets = torch.tensor([[[0, 1], [1, 3], [2, 3]]])
    at = torch.arange(3)[:, None]
    true = tokens[at, targets]
    exact = compare(true, tokens, targets, mean)
    assert exact.centred.float().min() > 0.999
    blind = compare(mean[targets], tokens, targets, mean)
    assert bool((blind.centred == 0).all())
    assert torch.equal(blind.cosine, blind.of_mean)
    between = compare(torch.lerp(mean[targets], true, share), tokens, targets, mean)
    for values in vars(between).values():
        assert values.abs().max() <= 1.001


@pytest.fixture(scope="module")
def bank() -> Bank:
    model = encoder(class_token=False)
    with torch.no_grad():
        return read_bank(FashionMNIST(), 28, 49, model)


def test_a_bank_is_spread_over_the_set_without_what_is_shown(bank: Bank) -> None:
    train = FashionMNIST()
    assert torch.equal(bank.images, train.images[torch.arange(512) * len(train) // 512])
    without = frozenset({0, int(len(train) // 512)})
    few = read_bank(train, 28, 49, lambda images: images.float().flatten(2).mT, without)
    assert torch.equal(few.images, bank.images[2:])
    torch.testing.assert_close(bank.mean_tokens(), bank.tokens.float().mean(dim=0))
    assert few.labels is not None
    assert torch.equal(few.labels, train.labels[torch.arange(2, 512) * len(train) // 512])


def test_what_is_in_the_bank_is_found_there(bank: Bank) -> None:
    """Images that are, against the rule, in the bank come back whole, each patch in its place."""
    chosen = torch.tensor([5, 300])
    images, tokens = bank.images[chosen], bank.tokens[chosen]
    targets = torch.tensor([[[8, 9, 24], [30, 31, 32]], [[24, 25, 26], [0, 7, 48]]])
    prediction = tokens[torch.arange(2)[:, None], targets]
    found = retrieve(images, prediction, tokens, targets, bank, 4)
    assert torch.equal(found.by_target, images)
    assert torch.equal(found.by_prediction, images)
    assert not torch.equal(found.by_mean, images)
    assert found.example_image.tolist() == [0, 0, 1, 1]
    assert found.example_place.tolist() == [9, 25, 31, 7]
    near = neighbours(images, tokens.float().mean(dim=1), None, bank)
    assert torch.equal(near.by_features[:, 0], images)
    assert torch.equal(near.by_pixels[:, 0], images)
    assert bool((near.labels == -1).all())


@pytest.mark.parametrize("class_token", [False, True])
def test_attention_is_that_of_the_last_block(class_token: bool) -> None:
    """Values weighted by it, through the rest of the block, give what the encoder gives."""
    model, images = encoder(class_token), FashionMNIST(split="test").images[:3]
    attention = last_attention(model, images)  # [n, H, L, L]
    assert attention.sum(dim=-1).sub(1).abs().max() < 1e-5
    with torch.no_grad():
        x, sequences = model.embed(images)
        x, delta = model.blocks[:-1].run(x, sequences)
        block = model.blocks.blocks()[-1]
        total, qkv = block.begin(x, delta)
        values = qkv.view(3, attention.shape[-1], 3, 2, 16)[:, :, 2].transpose(1, 2)  # [n, H, L, d]
        y = total + block.attn.proj((attention @ values).transpose(1, 2).flatten(2).flatten(0, 1))
        y = model.norm(y + block.mlp(block.norm2(y))).view(3, -1, 32)
        torch.testing.assert_close(y, model(images), rtol=0, atol=1e-4)
    looks = attended(model, images)
    assert looks.from_patch.shape == looks.received.shape == (3, 2, 49)
    assert looks.from_class.shape == (3, 2 * class_token, 49)
    if not class_token:
        torch.testing.assert_close(looks.from_patch.float().mean(dim=-1), torch.ones(3, 2), rtol=0, atol=2e-3)


@pytest.mark.parametrize("normalised_with", [None, 1e-6])
def test_a_decoder_that_is_right_paints_the_image(bank: Bank, normalised_with: float | None) -> None:
    images = FashionMNIST(split="test").images[:2]
    pixels = cut((images / 255 - 0.29) / 0.35, 4).permute(0, 1, 3, 4, 2).flatten(2)  # [n, N, p p C]
    if normalised_with is not None:
        variance, mean = torch.var_mean(pixels, dim=2, keepdim=True)
        pixels = (pixels - mean) / (variance + normalised_with).sqrt()
    hidden = torch.arange(10, 40).repeat(2, 1)
    pixel_mean, pixel_std = torch.tensor([0.29]), torch.tensor([0.35])
    painted = paint(images, pixels, hidden, bank, 4, pixel_mean, pixel_std, normalised_with)
    assert torch.equal(painted.painted, images)
    assert not torch.equal(painted.given, images)
    assert painted.correlation.float().nan_to_num(1).min() > 0.99
    assert painted.of_mean.float().nan_to_num(0).max() < 0.99


def test_correlation_leaves_out_flat_patches() -> None:
    one, flat = rows(0, 1, 1, 1, 2, 2), torch.full((1, 1, 1, 2, 2), 7.0)
    assert math.isnan(correlation(one, flat).item())
    assert correlation(flat, 10 * one).item() == 0
    assert correlation(-3 * one, 10 * one).item() == pytest.approx(-1)


def test_parts_that_are_not_whole_are_none() -> None:
    looks = attended(encoder(class_token=False), FashionMNIST(split="test").images[:1])
    tensors = Showing(attended=looks).tensors()
    again = showing_of(tensors | {"images": torch.zeros(1)})
    assert again.attended is not None
    assert torch.equal(again.attended.received, looks.received)
    assert again.predictions is None
    del tensors["attended.place"]
    assert showing_of(tensors).attended is None

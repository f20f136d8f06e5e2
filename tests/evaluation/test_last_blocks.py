import pytest
import torch

from fastjepa.data.fashion_mnist import FashionMNIST
from fastjepa.evaluation.layers import last_blocks
from fastjepa.models import VisionTransformer, ViTShape, initialise


def encoder_of(depth: int, class_token: bool) -> VisionTransformer:
    shape = ViTShape((28, 28), 4, width=32, depth=depth, heads=2, channels=1, class_token=class_token)
    encoder = VisionTransformer(shape, (0.286,), (0.353,))
    initialise(encoder, "xavier", torch.Generator().manual_seed(0))
    return encoder


@pytest.mark.parametrize("class_token", [False, True])
def test_each_is_what_an_encoder_cut_there_would_give(class_token: bool) -> None:
    images = FashionMNIST(split="test").images[:5]
    encoder = encoder_of(5, class_token)
    found = last_blocks(encoder, images, 4)
    for depth, tokens in zip((2, 3, 4, 5), found, strict=True):
        cut = encoder_of(depth, class_token)
        state = {k: v for k, v in encoder.state_dict().items() if k in cut.state_dict()}
        cut.load_state_dict(state)
        torch.testing.assert_close(tokens, cut(images)[:, int(class_token) :], rtol=0, atol=1e-5)
        assert tokens.shape == (5, 49, 32)
        assert not tokens.requires_grad
    assert not torch.equal(found[0], found[1])


def test_all_blocks_and_too_many() -> None:
    images = FashionMNIST(split="test").images[:2]
    assert len(last_blocks(encoder_of(2, False), images, 2)) == 2
    with pytest.raises(ValueError, match="the last 4 blocks of an encoder of depth 2: ask for 1 to 2"):
        last_blocks(encoder_of(2, False), images, 4)

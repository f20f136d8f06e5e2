import pytest
import torch
from torch import Tensor

from fastjepa.data.fashion_mnist import FashionMNIST
from fastjepa.evaluation import pixel_features, pool_features


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor, Tensor]]:
    clothes = FashionMNIST(split="test")
    return [(clothes.images[i : i + 7], clothes.labels[i : i + 7].int()) for i in range(0, 20, 7)]


def patches(images: Tensor) -> Tensor:
    """Each patch's pixels as its token: [B, 1, 28, 28] -> [B, 49, 16], in bf16."""
    return torch.nn.functional.unfold(images.float(), 4, stride=4).mT.bfloat16()


def test_pool_features_averages_tokens_in_fp32(batches: list[tuple[Tensor, Tensor]]) -> None:
    features, labels = pool_features(patches, batches, "cpu")
    images = torch.cat([images for images, _ in batches])
    assert features.dtype == torch.float32
    assert features.shape == (21, 16)
    # Summed in bf16, 49 pixel values would be off by whole units.
    torch.testing.assert_close(features, patches(images).float().mean(1))
    assert torch.equal(labels, torch.cat([labels for _, labels in batches]).long())


def test_pooled_features_can_be_trained_on(batches: list[tuple[Tensor, Tensor]]) -> None:
    weight = torch.ones(16, 3, requires_grad=True)
    features, _ = pool_features(lambda images: patches(images).float() @ weight, batches, "cpu")
    assert not features.requires_grad
    probe = torch.ones(3, requires_grad=True)
    (features @ probe).sum().backward()
    assert probe.grad is not None


def test_pool_features_says_what_encode_returned(batches: list[tuple[Tensor, Tensor]]) -> None:
    with pytest.raises(ValueError, match=r"returned \[7, 784\] for 7 images"):
        pool_features(lambda images: images.flatten(1).float(), batches, "cpu")
    with pytest.raises(ValueError, match="empty"):
        pool_features(patches, [], "cpu")


def test_pixel_features_are_in_the_unit_range(batches: list[tuple[Tensor, Tensor]]) -> None:
    features, labels = pixel_features(batches)
    assert features.shape == (21, 784)
    assert features.min() == 0
    assert features.max() == 1
    assert labels.dtype == torch.int64
    with pytest.raises(ValueError, match="empty"):
        pixel_features([])

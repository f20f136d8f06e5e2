from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from fastjepa.data.fashion_mnist import FashionMNIST
from fastjepa.evaluation.attentive import (
    AttentiveProbe,
    AttentiveSettings,
    attentive_correct,
    fit_attentive,
)


@pytest.mark.parametrize(("width", "heads"), [(64, 1), (64, 4), (128, 2)])
def test_it_attends_as_torch_does(width: int, heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    probe = AttentiveProbe(width, 10, heads, generator).double()
    for parameter in probe.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4
    reference = nn.MultiheadAttention(width, heads, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([probe.q.weight, probe.k.weight, probe.v.weight]))
        # A bias of keys adds the same to all scores of a head.
        bias = torch.randn(width, generator=generator, dtype=torch.float64)
        reference.in_proj_bias.copy_(torch.cat([probe.q.bias, bias, probe.v.bias]))
        reference.out_proj.weight.copy_(torch.eye(width))
        reference.out_proj.bias.zero_()
    tokens = torch.randn(3, 17, width, generator=generator, dtype=torch.float64)
    query = probe.query.expand(3, 1, -1)
    wanted, _ = reference(query, tokens, tokens)
    torch.testing.assert_close(probe.attend(tokens), wanted[:, 0])


def test_heads_divide_any_width() -> None:
    for width in (8, 40, 100, 192, 384, 1280, 97):
        assert width % AttentiveProbe(width, 2).heads == 0
    assert AttentiveProbe(384, 2).heads == 6


def patch_tokens(split: str, count: int) -> tuple[Tensor, Tensor]:
    """Pixels of patches with their places: [count, 49, 16 + 16]."""
    clothes = FashionMNIST(split=split)  # type: ignore[arg-type]
    images = clothes.images[:count].float() / 255
    patches = nn.functional.unfold(images, 4, stride=4).mT  # [n, 49, 16]
    places = torch.randn(49, 16, generator=torch.Generator().manual_seed(0)).expand(count, -1, -1)
    return torch.cat([patches, places], dim=2), clothes.labels[:count]


def test_it_learns_from_tokens_what_their_mean_does_not_say() -> None:
    # The mean over patches has lost where they were; the label is what is in one place.
    tokens, _ = patch_tokens("train", 1500)
    labels = (tokens[:, 24, :16].mean(dim=1) > 0.35).long()
    tokens = tokens - tokens[..., :16].mean(dim=1, keepdim=True).repeat(1, 1, 2) * torch.tensor(
        [1.0, 0]
    ).repeat_interleave(16)
    assert torch.allclose(tokens.mean(dim=1), tokens[:1].mean(dim=1), atol=1e-5), "the mean tells nothing"

    def epoch(number: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(1000, generator=torch.Generator().manual_seed(number))
        return ((tokens[some], labels[some]) for some in order.split(100))

    how = AttentiveSettings(epochs=12, batch=100, lr=3e-3)
    probe = fit_attentive(epoch, 1000, 32, 2, "cpu", how)
    right = attentive_correct(probe, [(tokens[1000:], labels[1000:])], "cpu")
    assert right.shape == (500,)
    chance = max(labels[1000:].double().mean().item(), 1 - labels[1000:].double().mean().item())
    assert right.double().mean() > chance + 0.1
    again = fit_attentive(epoch, 1000, 32, 2, "cpu", how)
    assert all(torch.equal(a, b) for a, b in zip(probe.parameters(), again.parameters(), strict=True))

"""jepa_loss: from the target encoder's last hidden states to a number, and its gradient."""

import torch
from torch import Tensor

import fastjepa_kernels as fk
from bench.kernels import published, stock
from bench.kernels.case import Case, Compare, Phase, Random, Scale, Way, ours


def case(
    name: str, blocks: int, images: int, patches: int, kept: int, width: int, dtype: torch.dtype
) -> Case:
    def make(random: Random) -> tuple[Tensor, ...]:
        prediction = random.normal(blocks, images, kept, width, dtype=dtype)
        hidden = 3 * random.normal(images, patches, width, dtype=dtype) + 1
        index = random.kept(blocks * images, patches, kept).view(blocks, images, kept)
        weight, bias = (1 + random.normal(width, dtype=dtype) / 4, random.normal(width, dtype=dtype) / 4)
        return prediction, hidden, index, weight, bias

    def ways(device_type: str) -> list[Way]:
        return [
            *ours("jepa_loss", fk.jepa_loss, device_type),
            Way("published", "published", published.loss),
            Way("gather first", "stock", stock.loss),
        ]

    # Both inputs once, the gradient once; without it, for evaluation, the inputs alone.
    values = blocks * images * kept * width * dtype.itemsize
    index_bytes = blocks * images * kept * 8
    return Case(
        op="jepa_loss",
        name=name,
        dtype=dtype,
        make=make,
        ways=ways,
        exact=published.loss,
        bytes_moved={"forward": 2 * values + index_bytes, "forward+backward": 3 * values + index_bytes},
        with_gradient=(0,),
    )


def cases(scale: Scale, dtype: torch.dtype) -> list[Case]:
    if scale == "small":
        return [case("4 blocks of 5 of 13 tokens, width 40", 4, 3, 13, 5, 40, dtype)]
    if scale == "cpu":
        return [
            case("ViT-S, 4 blocks of 33 of 196 tokens of 16 images", 4, 16, 196, 33, 384, dtype),
            case("ViT-B, 4 blocks of 33 of 196 tokens of 16 images", 4, 16, 196, 33, 768, dtype),
        ]
    return [
        case("ViT-L, 4 blocks of 33 of 196 tokens of 128 images", 4, 128, 196, 33, 1024, dtype),
        case("ViT-L, 4 blocks of 33 of 196 tokens of 512 images", 4, 512, 196, 33, 1024, dtype),
    ]


def test_jepa_loss(case: Case, phase: Phase, compare: Compare) -> None:
    compare(case, phase)

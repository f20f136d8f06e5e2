"""gather_tokens: the kept tokens of each image."""

import torch
from torch import Tensor

import fastjepa_kernels as fk
from bench.kernels import published, stock
from bench.kernels.case import Case, Compare, Phase, Random, Scale, Way, ours


def case(
    name: str,
    images: int,
    patches: int,
    kept: int,
    width: int,
    dtype: torch.dtype,
    index_dtype: torch.dtype = torch.int64,
    with_pos: bool = False,
    repeated: bool = False,
) -> Case:
    def make(random: Random) -> tuple[Tensor | None, ...]:
        x = random.normal(images, patches, width, dtype=dtype)
        if repeated:
            index = random.below(patches, images, kept)  # [B, K]
        else:
            index = random.kept(images, patches, kept)  # [B, K]
        pos = random.normal(patches, width, dtype=dtype) if with_pos else None
        return x, index.to(index_dtype), pos

    def ways(device_type: str) -> list[Way]:
        return [
            *ours("gather_tokens", fk.gather_tokens, device_type),
            Way("published", "published", published.gather_tokens),
            Way("index_select", "stock", stock.index_select),
            Way("take_along_dim", "stock", stock.take_along_dim),
        ]

    index_bytes = images * kept * index_dtype.itemsize
    row_bytes = width * dtype.itemsize
    pos_bytes = patches * row_bytes if with_pos else 0
    forward = 2 * images * kept * row_bytes + index_bytes + pos_bytes
    backward = images * (kept + patches) * row_bytes + index_bytes + pos_bytes
    return Case(
        op="gather_tokens",
        name=name,
        dtype=dtype,
        make=make,
        ways=ways,
        exact=published.gather_tokens,
        bytes_moved={"forward": forward, "backward": backward, "forward+backward": forward + backward},
        with_gradient=(0, 2) if with_pos else (0,),
    )


def cases(scale: Scale, dtype: torch.dtype) -> list[Case]:
    if scale == "small":
        return [
            case("3 of 7 tokens, int32", 5, 7, 3, 24, dtype, torch.int32),
            case("9 of 6 tokens, repeated, with positions", 3, 6, 9, 40, dtype, repeated=True, with_pos=True),
        ]
    if scale == "cpu":
        return [
            case("ViT-S, 50 of 196 tokens of 64 images", 64, 196, 50, 384, dtype),
            case("ViT-B, 50 of 196 tokens of 16 images", 16, 196, 50, 768, dtype),
        ]
    return [
        case("ViT-L, 50 of 196 tokens of 128 images", 128, 196, 50, 1024, dtype),
        case("ViT-L, 82 of 196 tokens of 512 images", 512, 196, 82, 1024, dtype),
        case(
            "ViT-L, 82 of 196 tokens of 512 images, with positions", 512, 196, 82, 1024, dtype, with_pos=True
        ),
    ]


def test_gather_tokens(case: Case, phase: Phase, compare: Compare) -> None:
    compare(case, phase)

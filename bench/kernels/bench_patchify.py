"""patchify_gather: the pixels of the kept patches."""

from functools import partial

import torch
from torch import Tensor

import fastjepa_kernels as fk
from bench.kernels import published, stock
from bench.kernels.case import Case, Compare, Phase, Random, Scale, Way, ours


def case(name: str, images: int, side: int, patch_size: int, kept: int | None, dtype: torch.dtype) -> Case:
    patches = (side // patch_size) ** 2

    def make(random: Random) -> tuple[Tensor | None, ...]:
        pixels = random.below(256, images, 3, side, side, dtype=torch.uint8)
        index = None if kept is None else random.kept(images, patches, kept)  # [B, K]
        # On the device already, as a trainer has them.
        mean = torch.tensor([0.485, 0.456, 0.406], device=random.device)
        std = torch.tensor([0.229, 0.224, 0.225], device=random.device)
        return pixels, index, mean, std

    def op(pixels: Tensor, index: Tensor | None, mean: Tensor, std: Tensor) -> Tensor:
        return fk.patchify_gather(pixels, index, patch_size, mean, std, dtype)

    def ways(device_type: str) -> list[Way]:
        return [
            *ours("patchify_gather", op, device_type),
            Way("published", "published", partial(published.patchify, patch_size=patch_size, dtype=dtype)),
            Way("bytes first", "stock", partial(stock.patchify, patch_size=patch_size, dtype=dtype)),
        ]

    pixels = images * (patches if kept is None else kept) * 3 * patch_size**2
    index_bytes = 0 if kept is None else images * kept * 8
    return Case(
        op="patchify_gather",
        name=name,
        dtype=dtype,
        make=make,
        ways=ways,
        exact=partial(published.patchify, patch_size=patch_size, dtype=torch.float64),
        bytes_moved={"forward": pixels * (1 + dtype.itemsize) + index_bytes},
    )


def cases(scale: Scale, dtype: torch.dtype) -> list[Case]:
    if scale == "small":
        return [
            case("5 of 6 x 6 patches of 7 pixels", 3, 42, 7, 5, dtype),
            case("all of 3 x 3 patches of 8 pixels", 2, 24, 8, None, dtype),
        ]
    if scale == "cpu":
        return [
            case("224 pixels, 50 of 196 patches of 16 images", 16, 224, 16, 50, dtype),
            case("224 pixels, all patches of 16 images", 16, 224, 16, None, dtype),
        ]
    return [
        case("224 pixels, 50 of 196 patches of 512 images", 512, 224, 16, 50, dtype),
        case("224 pixels, all patches of 512 images", 512, 224, 16, None, dtype),
        case("224 pixels, all of 256 patches of 14 of 512 images", 512, 224, 14, None, dtype),
    ]


def test_patchify_gather(case: Case, phase: Phase, compare: Compare) -> None:
    compare(case, phase)

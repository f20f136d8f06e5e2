"""ema_update_: the target encoder after every optimizer step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastjepa_kernels as fk
from bench.kernels import published, stock
from bench.kernels.case import Case, Compare, Phase, Random, Scale, Way, ours

MOMENTUM = 0.996


def vit_shapes(width: int, depth: int, patch_size: int = 16) -> list[tuple[int, ...]]:
    """Of the parameters of a ViT, with the fixed positions left out."""
    block: list[tuple[int, ...]] = [
        (width,),
        (width,),
        (3 * width, width),
        (3 * width,),
        (width, width),
        (width,),
    ]
    block += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(width, 3, patch_size, patch_size), (width,), *block * depth, (width,), (width,)]


def case(
    name: str, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, working: torch.dtype | None = None
) -> Case:
    """An fp32 average of parameters of `dtype`."""

    def make(random: Random) -> tuple[list[Tensor] | None, ...]:
        shadow = [random.normal(*shape, dtype=torch.float32) for shape in shapes]
        source = [random.normal(*shape, dtype=dtype) for shape in shapes]
        if working is None:
            return shadow, source, None
        return (
            shadow,
            source,
            [torch.full(shape, torch.nan, dtype=working, device=random.device) for shape in shapes],
        )

    def then_copy(update: Callable[..., None]) -> Callable[..., Any]:
        def call(shadow: list[Tensor], source: list[Tensor], copies: list[Tensor] | None) -> Any:
            update(shadow, source, MOMENTUM)
            if copies is not None:
                torch._foreach_copy_(copies, shadow)
            return shadow, copies

        return call

    def op(shadow: list[Tensor], source: list[Tensor], copies: list[Tensor] | None) -> Any:
        fk.ema_update_(shadow, source, MOMENTUM, copies)
        return shadow, copies

    def ways(device_type: str) -> list[Way]:
        return [
            *ours("ema_update_", op, device_type),
            Way("published", "published", then_copy(published.ema)),
            Way("foreach lerp", "stock", then_copy(stock.foreach_lerp)),
            Way("foreach mul, add", "stock", then_copy(stock.foreach_mul_add)),
        ]

    elements = sum(torch.Size(shape).numel() for shape in shapes)
    bytes_each = 8 + dtype.itemsize + (0 if working is None else working.itemsize)
    return Case(
        op="ema_update_",
        name=name,
        dtype=dtype,
        make=make,
        ways=ways,
        exact=then_copy(published.ema),
        bytes_moved={"forward": elements * bytes_each},
    )


def cases(scale: Scale, dtype: torch.dtype) -> list[Case]:
    if scale == "small":
        shapes = [(3, 5), (), (17,), (0,), (1, 130), (2, 1, 4)]
        return [
            case("6 odd tensors", shapes, dtype),
            case("6 odd tensors with a bf16 copy", shapes, dtype, torch.bfloat16),
        ]
    if scale == "cpu":
        base = vit_shapes(768, 12)
        return [case(f"ViT-B, {len(base)} tensors", base, dtype)]
    large = vit_shapes(1024, 24)
    flat = [(sum(torch.Size(shape).numel() for shape in large),)]
    return [
        case(f"ViT-L, {len(large)} tensors", large, torch.float32),
        case(f"ViT-L, {len(large)} tensors with a bf16 copy", large, torch.float32, torch.bfloat16),
        case("ViT-L, flat", flat, torch.float32),
        case("ViT-L, flat with a bf16 copy", flat, torch.float32, torch.bfloat16),
        case("ViT-L, flat from bf16", flat, dtype),
    ]


def test_ema_update(case: Case, phase: Phase, compare: Compare) -> None:
    compare(case, phase)

"""adamw_ema_: the optimizer and the target encoder, after every backward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastjepa_kernels as fk
from bench.kernels import published, stock
from bench.kernels.case import Case, Compare, Phase, Random, Scale, Way, ours

LR, DECAY, MOMENTUM, STEP = 1e-3, 0.04, 0.996, 100
VIT_B, VIT_L = 85_649_664, 303_098_880  # elements of the encoders


def case(name: str, n: int, dtype: torch.dtype) -> Case:
    """A flat group whose gradient, weights and target encoder are in `dtype`, all else in fp32."""
    copied = dtype != torch.float32  # else the master itself is what is computed with

    def make(random: Random) -> tuple[Any, ...]:
        master, average, shadow = (random.normal(n, dtype=torch.float32) for _ in range(3))
        square = random.normal(n, dtype=torch.float32).square()
        grad = random.normal(n, dtype=dtype)
        hyper = torch.tensor(
            [LR, DECAY, MOMENTUM, STEP, 0, 1], dtype=torch.float64, device=random.device
        )  # as HYPER
        copies = [torch.full((n,), torch.nan, dtype=dtype, device=random.device) if copied else None] * 2
        weight, working = (None if copy is None else copy.clone() for copy in copies)
        return master, grad, average, square, hyper, weight, shadow, working

    def op(
        master: Tensor, grad: Tensor, average: Tensor, square: Tensor, hyper: Tensor, weight: Tensor | None,
        shadow: Tensor, working: Tensor | None,
    ) -> Any:  # fmt: skip
        fk.adamw_ema_(master, grad, average, square, hyper, weight=weight, shadow=shadow, working=working)
        return master, average, square, weight, shadow, working

    def in_passes(step: Callable[..., None], follow: Callable[..., None]) -> Callable[..., Any]:
        def call(
            master: Tensor, grad: Tensor, average: Tensor, square: Tensor, hyper: Tensor,
            weight: Tensor | None, shadow: Tensor, working: Tensor | None,
        ) -> Any:  # fmt: skip
            del hyper
            step(master, grad, average, square, LR, DECAY, STEP)
            follow([shadow], [master], MOMENTUM)
            if weight is not None and working is not None:
                torch._foreach_copy_([weight, working], [master, shadow])
            return master, average, square, weight, shadow, working

        return call

    def ways(device_type: str) -> list[Way]:
        return [
            *ours("adamw_ema_", op, device_type),
            Way("published", "published", in_passes(published.adamw, published.ema)),
            Way("fused AdamW, lerp, casts", "stock", in_passes(stock.fused_adamw, stock.foreach_lerp)),
        ]

    # Three read and written in fp32 and the average besides, a gradient read, two copies written.
    bytes_each = 4 * 8 + dtype.itemsize * (3 if copied else 1)
    return Case(
        op="adamw_ema_",
        name=name,
        dtype=dtype,
        make=make,
        ways=ways,
        exact=in_passes(published.adamw, published.ema),
        bytes_moved={"forward": n * bytes_each},
    )


def cases(scale: Scale, dtype: torch.dtype) -> list[Case]:
    if scale == "small":
        return [case(f"{n} elements", n, dtype) for n in (1, 1040, 9001)]
    if scale == "cpu":
        return [case("ViT-B, flat", VIT_B // 10, dtype)]
    return [case("ViT-B, flat", VIT_B, dtype), case("ViT-L, flat", VIT_L, dtype)]


def test_adamw_ema(case: Case, phase: Phase, compare: Compare) -> None:
    compare(case, phase)

"""layer_norm_quantize and gelu_quantize: what stands before a GEMM in fp8, quantised in the same pass.

In 16 bits alone, and on a GPU: nobody multiplies in fp8 elsewhere. Codes are compared as bytes.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastjepa_kernels as fk
from bench.kernels.case import Case, Compare, Phase, Random, Scale, Way, ours

EPS = 1e-6


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """[T, K] to its codes, as bytes, and a scale per row."""
    scale = (x.abs().amax(dim=1).to(torch.promote_types(x.dtype, torch.float32)) / 448).clamp(min=2**-126)
    return (x / scale[:, None]).to(torch.float8_e4m3fn).view(torch.uint8), scale


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total = x + residual
    return *quantise(F.layer_norm(total, x.shape[1:], weight, bias, EPS)), total


def gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantise(F.gelu(x))


def as_bytes(op: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    def call(*inputs: Any) -> tuple[Tensor, ...]:
        q, *rest = op(*inputs)
        return q.view(torch.uint8), *rest

    return call


@as_bytes
def our_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    return fk.layer_norm_quantize(x, weight, bias, EPS, residual)


@cache
def compiled(chain: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(chain, dynamic=False)


def ways(op: str, call: Callable[..., Any], chain: Callable[..., Any], device_type: str) -> list[Way]:
    eager = [*ours(op, call, device_type), Way("eager", "stock", chain)]
    if device_type == "cpu":  # compiling takes longer than any of this
        return eager
    return [*eager, Way("torch.compile", "stock", compiled(chain), starts_slowly=True)]


def layer_norm_case(name: str, tokens: int, width: int, dtype: torch.dtype) -> Case:
    def make(random: Random) -> tuple[Tensor, ...]:
        x, residual = (random.normal(tokens, width, dtype=dtype) for _ in range(2))
        weight, bias = (1 + random.normal(width, dtype=dtype) / 4, random.normal(width, dtype=dtype) / 4)
        return 3 * x + 1, weight, bias, residual

    # Both inputs and their sum, and a byte for each code.
    return Case(
        op="layer_norm_quantize",
        name=name,
        dtype=dtype,
        make=make,
        ways=lambda device: ways("layer_norm_quantize", our_layer_norm, layer_norm, device),
        exact=layer_norm,
        bytes_moved={"forward": tokens * (width * (3 * dtype.itemsize + 1) + 4)},
    )


def gelu_case(name: str, tokens: int, width: int, dtype: torch.dtype) -> Case:
    return Case(
        op="gelu_quantize",
        name=name,
        dtype=dtype,
        make=lambda random: (2 * random.normal(tokens, width, dtype=dtype),),
        ways=lambda device: ways("gelu_quantize", as_bytes(fk.gelu_quantize), gelu, device),
        exact=gelu,
        bytes_moved={"forward": tokens * (width * (dtype.itemsize + 1) + 4)},
    )


def cases(scale: Scale, dtype: torch.dtype) -> list[Case]:
    if scale == "cpu" or dtype.itemsize != 2:
        return []
    if scale == "small":
        return [
            layer_norm_case("7 tokens of width 40", 7, 40, dtype),
            gelu_case("7 tokens of width 90", 7, 90, dtype),
        ]
    sizes = [("B/16", 196, 768, 3072), ("L/16", 196, 1024, 4096), ("H/14", 256, 1280, 5120)]
    return [
        case
        for name, patches, width, hidden in sizes
        for case in (
            layer_norm_case(f"ViT-{name}, 128 images", 128 * patches, width, dtype),
            gelu_case(f"ViT-{name}, 128 images", 128 * patches, hidden, dtype),
        )
    ]


def test_fp8(case: Case, phase: Phase, compare: Compare) -> None:
    compare(case, phase)

"""The hand-written block on the device: as exact as autograd over separate modules, and without waiting."""

import copy

import pytest
import torch
from torch import Tensor

from fastjepa.models import Sequences, Stack, equal_sequences

CUDA = torch.device("cuda")
LENGTHS = [50, 33, 1, 120]


def stack(width: int, heads: int) -> Stack:
    torch.manual_seed(0)
    blocks = Stack(2, width, heads)
    for parameter in blocks.parameters():
        torch.nn.init.normal_(parameter, std=0.05 if parameter.ndim > 1 else 0.5)
    return blocks.to(CUDA)


def sequences(equal: bool) -> tuple[Sequences, int]:
    if equal:
        return equal_sequences(4, 50, CUDA), 200
    starts = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32, device=CUDA)
    return Sequences(starts, 128), sum(LENGTHS)


def outcome(blocks: Stack, x: Tensor, upstream: Tensor, cut: Sequences, rows: Tensor | None) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y, added = blocks.run(x, cut, rows)
    assert added is not None
    return [y + added, *torch.autograd.grad(y + added, [x, *blocks.parameters()], upstream)]


def error(one: Tensor, exact: Tensor) -> float:
    return float((one.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (384, 16), (1280, 16)])
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("some_rows", [False, True])
def test_errors_are_at_most_twice_those_of_separate_modules(
    width: int, heads: int, equal: bool, some_rows: bool
) -> None:
    cut, tokens = sequences(equal)
    rows = torch.arange(0, tokens, 3, device=CUDA) if some_rows else None
    exact_blocks = stack(width, heads).double()
    exact_blocks.is_fused = False
    blocks = copy.deepcopy(exact_blocks).bfloat16()
    exact_blocks.load_state_dict({k: v.double() for k, v in blocks.state_dict().items()})
    x = torch.randn(tokens, width, device=CUDA, dtype=torch.bfloat16)
    upstream = torch.randn(tokens if rows is None else len(rows), width, device=CUDA, dtype=torch.bfloat16)
    exact = outcome(exact_blocks, x.double(), upstream.double(), cut, rows)
    plain = outcome(blocks, x, upstream, cut, rows)
    blocks.is_fused = True
    names = ["output", "x", *(name for name, _ in blocks.named_parameters())]
    for name, one, other, right in zip(
        names, outcome(blocks, x, upstream, cut, rows), plain, exact, strict=True
    ):
        if name.endswith("qkv.bias"):  # a third of it is pure rounding
            continue
        assert error(one, right) <= 2 * error(other, right) + 1e-3, name


def test_the_same_bits_and_no_waiting() -> None:
    blocks, (cut, tokens) = stack(768, 12).bfloat16(), sequences(True)
    x = torch.randn(tokens, 768, device=CUDA, dtype=torch.bfloat16)
    first = outcome(blocks, x, x, cut, None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = outcome(blocks, x, x, cut, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))

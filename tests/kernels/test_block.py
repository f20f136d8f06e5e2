"""The block's hand-written passes against autograd over separate operations."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastjepa_kernels as fk
from fastjepa_kernels import block, choice
from fastjepa_kernels.block import Cut, Linear, Norm, add_norm, add_norm_linear, attend_and_feed

WIDTH, HEADS, HIDDEN, TOKENS = 48, 2, 96, 17
EPS = 1e-6
LENGTHS = [5, 0, 9, 3]


@pytest.fixture(params=["torch", "triton"])
def use(request: pytest.FixtureRequest) -> Iterator[str]:
    with fk.use(request.param):
        yield request.param


class Weights:
    def __init__(self, dtype: torch.dtype) -> None:
        def some(*shape: int) -> Tensor:
            return (0.3 * torch.randn(shape)).to(dtype).requires_grad_()

        self.norm1, self.norm2 = (Norm(some(WIDTH), some(WIDTH), EPS) for _ in range(2))
        self.qkv = Linear(some(3 * WIDTH, WIDTH), some(3 * WIDTH))
        self.proj = Linear(some(WIDTH, WIDTH), some(WIDTH))
        self.fc1 = Linear(some(HIDDEN, WIDTH), some(HIDDEN))
        self.fc2 = Linear(some(WIDTH, HIDDEN), some(WIDTH))
        self.x, self.delta = some(TOKENS, WIDTH), some(TOKENS, WIDTH)

    def leaves(self) -> list[Tensor]:
        layers = (self.norm1[:2], self.norm2[:2], self.qkv, self.proj, self.fc1, self.fc2)
        return [self.x, self.delta, *(tensor for layer in layers for tensor in layer)]


def cut() -> Cut:
    starts = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    return Cut(starts, max(LENGTHS))


def by_hand(w: Weights, rows: Tensor | None, has_delta: bool) -> Tensor:
    total, qkv = add_norm_linear(w.x, w.delta if has_delta else None, w.norm1, w.qkv)
    y, added = attend_and_feed(total, qkv, cut(), HEADS, w.proj, w.norm2, w.fc1, w.fc2, rows)
    return add_norm(y, added, w.norm1)


def by_autograd(w: Weights, rows: Tensor | None, has_delta: bool) -> Tensor:
    def norm(x: Tensor, by: Norm) -> Tensor:
        return F.layer_norm(x, (WIDTH,), *by)

    total = w.x + w.delta if has_delta else w.x
    parts = F.linear(norm(total, w.norm1), *w.qkv).view(TOKENS, 3, HEADS, -1)
    out = fk.packed_attention(parts, cut().cu_seqlens, cut().max_seqlen).flatten(1)
    rows = torch.arange(TOKENS) if rows is None else rows
    y = total[rows] + F.linear(out[rows], *w.proj)
    return norm(y + F.linear(F.gelu(F.linear(norm(y, w.norm2), *w.fc1)), *w.fc2), w.norm1)


@pytest.fixture(params=[False, True])
def remakes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether what can be made again is kept, as on a CPU, or made again, as on a GPU."""
    if request.param:
        monkeypatch.setattr(block, "_or_remake", lambda _made: None)
    return bool(request.param)


@pytest.mark.parametrize("rows", [None, torch.tensor([16, 0, 3, 9])])
@pytest.mark.parametrize("has_delta", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.usefixtures("use", "remakes")
def test_output_and_every_gradient(
    rows: Tensor | None, has_delta: bool, dtype: torch.dtype, bound: float
) -> None:
    w = Weights(dtype)
    leaves = [leaf for leaf in w.leaves() if has_delta or leaf is not w.delta]
    out, expected = by_hand(w, rows, has_delta), by_autograd(w, rows, has_delta)
    torch.testing.assert_close(out, expected, rtol=bound, atol=bound)
    upstream = torch.randn_like(out)
    found, wanted = (torch.autograd.grad(result, leaves, upstream) for result in (out, expected))
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= 10 * bound * other.norm()


def test_outputs_whose_gradients_differ() -> None:
    w = Weights(torch.float64)
    total, qkv = add_norm_linear(w.x, w.delta, w.norm1, w.qkv)
    y, added = attend_and_feed(total, qkv, cut(), HEADS, w.proj, w.norm2, w.fc1, w.fc2)
    (dbias,) = torch.autograd.grad((2 * y + 3 * added).sum(), w.fc2.bias)
    torch.testing.assert_close(dbias, torch.full_like(dbias, 3.0 * TOKENS))


def test_the_caller_s_gradient_is_left_alone() -> None:
    w = Weights(torch.float32)
    out = by_hand(w, None, has_delta=True)
    upstream = torch.randn_like(out)
    before = upstream.clone()
    first = torch.autograd.grad(out, w.leaves(), upstream, retain_graph=True)
    again = torch.autograd.grad(out, w.leaves(), upstream)
    assert torch.equal(upstream, before)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("way", ["torch", "triton"])
def test_the_backward_pass_runs_as_the_forward_pass_did(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    picked: list[tuple[str, str]] = []
    pick = choice.Ways.pick

    def watched(ways: choice.Ways, preference: str, device: torch.device, *args: Any) -> choice.Way:
        found = pick(ways, preference, device, *args)
        picked.append((ways.op, found.name))
        return found

    w = Weights(torch.float32)
    with fk.use(way, strict=True):
        total, qkv = add_norm_linear(w.x, w.delta, w.norm1, w.qkv)
        y, added = attend_and_feed(total, qkv, cut(), HEADS, w.proj, w.norm2, w.fc1, w.fc2)
        out = y.square().sum() + added.sum() + add_norm(y, added, w.norm1).square().sum()
    monkeypatch.setattr(choice.Ways, "pick", watched)
    with fk.use("torch" if way == "triton" else "triton"):
        out.backward()
    ops = "add_layer_norm_backward", "gelu_backward_", "column_sums", "packed_attention_backward"
    assert {op for op, _ in picked} == set(ops)
    assert {name for _, name in picked} == {way}


@pytest.mark.parametrize("ways", [("torch", "triton"), ("triton", "torch")])
def test_a_slice_of_columns_from_one_implementation_to_the_other(ways: tuple[str, str]) -> None:
    w = Weights(torch.float32)
    x = torch.randn(TOKENS, 2 * WIDTH)[:, WIDTH:].requires_grad_()
    with fk.use(ways[0]):
        out = add_norm(x, None, w.norm1)
    with fk.use(ways[1]):
        found = torch.autograd.grad(out.square().sum(), [x, *w.norm1[:2]])
    expected = F.layer_norm(x, (WIDTH,), *w.norm1).square().sum()
    torch.testing.assert_close(found, torch.autograd.grad(expected, [x, *w.norm1[:2]]), rtol=1e-4, atol=1e-4)


def test_what_a_block_keeps(remakes: bool) -> None:
    """Numbers for each token of width D, besides its statistics and its inputs."""
    w, kept = Weights(torch.float32), {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape[:1] == (TOKENS,):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total, qkv = add_norm_linear(w.x, w.delta, w.norm1, w.qkv)
        attend_and_feed(total, qkv, cut(), HEADS, w.proj, w.norm2, w.fc1, w.fc2)
    # total, qkv, the attention's output and y; fc1's output, here of 2 D; without remaking, that much again
    # for GELU, and two norms. Mean and rstd of both norms come on top.
    expected = (1 + 3 + 1 + 1 + 2) * WIDTH + (0 if remakes else (2 + 1 + 1) * WIDTH)
    assert sum(kept.values()) / TOKENS - expected in (0, 4)


def test_flops_are_those_of_separate_operations() -> None:
    counts = []
    for run in (by_hand, by_autograd):
        w = Weights(torch.float32)
        with FlopCounterMode(display=False) as counter:
            run(w, None, True).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_a_second_derivative_is_refused() -> None:
    w = Weights(torch.float64)
    (dx,) = torch.autograd.grad(by_hand(w, None, True).square().sum(), w.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()

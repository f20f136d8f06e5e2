"""The block's hand-written passes against autograd over separate operations."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
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


# Of Weights.leaves().
SOME = {
    "stream": [0],
    "branch": [1],
    "all weights": range(2, 14),
    "norms": range(2, 6),
    "biases": [3, 5, 7, 9, 11, 13],
    **{f"weight {number}": [number] for number in range(2, 14)},
}


@pytest.mark.parametrize("wanted", SOME)
@pytest.mark.parametrize("rows", [None, torch.tensor([16, 0, 3, 9])])
@pytest.mark.usefixtures("remakes")
def test_only_what_is_asked_for_is_computed(wanted: str, rows: Tensor | None) -> None:
    counts, gradients, kept = [], [], Weights(torch.float64)
    for run in (by_hand, by_autograd):
        for number, leaf in enumerate(kept.leaves()):
            leaf.requires_grad_(number in SOME[wanted]).grad = None
        out = run(kept, rows, True)
        with FlopCounterMode(display=False) as counter:
            out.square().sum().backward()
        counts.append(counter.get_total_flops())
        gradients.append([leaf.grad for leaf in kept.leaves()])
    assert counts[0] == counts[1]
    assert [one is None for one in gradients[0]] == [other is None for other in gradients[1]]
    for one, other in zip(*gradients, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("number", range(8))
@pytest.mark.usefixtures("remakes")
def test_weights_after_the_last_one_that_is_asked_for(number: int) -> None:
    """The outputs themselves, without a norm after them that asks for more."""
    w = Weights(torch.float64)
    asked = [w.qkv.weight, w.qkv.bias, w.norm2.weight, w.norm2.bias, *w.fc1, *w.fc2][number]
    for leaf in w.leaves():
        leaf.requires_grad_(leaf is asked)
    total, qkv = add_norm_linear(w.x, w.delta, w.norm1, w.qkv)
    y, added = attend_and_feed(total, qkv, cut(), HEADS, w.proj, w.norm2, w.fc1, w.fc2)
    with FlopCounterMode(display=False) as counter:
        (found,) = torch.autograd.grad((y.square() + added.square()).sum(), asked)
    flops = counter.get_total_flops()
    total = w.x + w.delta
    parts = F.linear(F.layer_norm(total, (WIDTH,), *w.norm1), *w.qkv).view(TOKENS, 3, HEADS, -1)
    out = fk.packed_attention(parts, cut().cu_seqlens, cut().max_seqlen).flatten(1)
    y = total + F.linear(out, *w.proj)
    added = F.linear(F.gelu(F.linear(F.layer_norm(y, (WIDTH,), *w.norm2), *w.fc1)), *w.fc2)
    with FlopCounterMode(display=False) as counter:
        (expected,) = torch.autograd.grad((y.square() + added.square()).sum(), asked)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert flops == counter.get_total_flops()


def test_a_sum_that_nobody_asks_for_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any) -> Tensor:
        raise AssertionError("no bias asks for it")

    monkeypatch.setattr(block, "column_sums", refuse)
    w = Weights(torch.float64)
    for bias in (w.qkv.bias, w.fc2.bias):
        bias.requires_grad_(False)
    total, qkv = add_norm_linear(w.x, w.delta, w.norm1, w.qkv)
    y, added = attend_and_feed(total, qkv, cut(), HEADS, w.proj, w.norm2, w.fc1, w.fc2)
    (2 * y + 3 * added).sum().backward()
    assert w.fc2.weight.grad is not None


@pytest.mark.filterwarnings("error")  # of memory that is asked for
def test_fake_tensors_have_gradients() -> None:
    with FakeTensorMode():
        w = Weights(torch.float32)
        y, added = attend_and_feed(
            w.x, torch.randn(TOKENS, 3 * WIDTH), Cut(torch.zeros(5, dtype=torch.int32), 9), HEADS, w.proj,
            w.norm2, w.fc1, w.fc2,
        )  # fmt: skip
        (2 * y + 3 * added).sum().backward()
        assert w.fc2.bias.grad is not None
        assert w.fc2.bias.grad.shape == (WIDTH,)


def good() -> dict[str, Any]:
    w = Weights(torch.float32)
    return {
        "total": w.x, "qkv": torch.randn(TOKENS, 3 * WIDTH), "cut": cut(), "heads": HEADS, "proj": w.proj,
        "norm": w.norm2, "fc1": w.fc1, "fc2": w.fc2, "rows": torch.tensor([3]),
    }  # fmt: skip


def linear(outputs: int, inputs: int, **options: Any) -> Linear:
    return Linear(torch.zeros(outputs, inputs, **options), torch.zeros(outputs, **options))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"total": torch.zeros(2, TOKENS, WIDTH)},
            r"total must be floating point \[T, D\], got \[2, 17, 48\]",
        ),
        ({"total": torch.zeros(TOKENS, WIDTH).int()}, r"total must be floating point .* int32"),
        ({"qkv": torch.zeros(TOKENS, 48)}, r"qkv must be \[17, 144\] float32 on cpu, got \[17, 48\]"),
        ({"qkv": torch.zeros(TOKENS, 144).half()}, r"qkv must be \[17, 144\] float32 .* float16 on cpu"),
        ({"qkv": torch.zeros(TOKENS, 144, device="meta")}, r"qkv must be .* on cpu, got .* on meta"),
        ({"heads": 0}, "width / heads must be a multiple of 8 up to 128, got 48 / 0"),
        ({"heads": 5}, "width / heads must be a multiple of 8 up to 128, got 48 / 5"),
        ({"heads": 4}, "width / heads must be a multiple of 8 up to 128, got 48 / 4"),
        ({"proj": linear(48, 40)}, r"proj\.weight must be \[48, 48\] float32 on cpu, got \[48, 40\]"),
        ({"norm": Norm(torch.ones(1), torch.zeros(48), EPS)}, r"norm\.weight must be \[48\] .*got \[1\]"),
        ({"norm": Norm(torch.ones(48), torch.zeros(48).double(), EPS)}, r"norm\.bias must be .* float64"),
        ({"fc1": linear(96, 40)}, r"fc1\.weight must be \[96, 48\] float32 on cpu, got \[96, 40\]"),
        ({"fc1": Linear(torch.zeros(96, 48), torch.zeros(1))}, r"fc1\.bias must be \[96\] .*got \[1\]"),
        ({"fc1": Linear(torch.tensor(0.0), torch.zeros(1))}, r"fc1\.weight must be \[0, 48\] .*got \[\]"),
        ({"fc2": linear(48, 90)}, r"fc2\.weight must be \[48, 96\] float32 on cpu, got \[48, 90\]"),
        ({"fc2": linear(48, 96, device="meta")}, r"fc2\.weight must be .* on cpu, got .* on meta"),
        ({"cut": Cut(torch.zeros(3), 9)}, r"cu_seqlens must be int32 \[sequences \+ 1\], got \[3\] float32"),
        ({"cut": Cut(cut().cu_seqlens, -1)}, "max_seqlen must be 0 or more, got -1"),
        ({"cut": Cut(cut().cu_seqlens, 9, equal=True)}, "4 sequences of equal length 9 do not fill 17"),
        ({"cut": Cut(cut().cu_seqlens.to("meta"), 9)}, "on one device, got total on cpu, cu_seqlens on meta"),
        ({"rows": torch.zeros(3).int()}, r"rows must be int64 \[R\], got \[3\] int32"),
        ({"rows": torch.zeros(1, 3).long()}, r"rows must be int64 \[R\], got \[1, 3\] int64"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    attend_and_feed(**good())
    with pytest.raises(ValueError, match=message):
        attend_and_feed(**{**good(), **arguments})


def test_wrong_arguments_of_the_first_part_are_named() -> None:
    w = Weights(torch.float32)
    for call in (add_norm, lambda x, delta, norm: add_norm_linear(x, delta, norm, w.qkv)):
        with pytest.raises(ValueError, match=r"x must be floating point \[T, D\], got \[48\]"):
            call(w.x[0], None, w.norm1)
        with pytest.raises(ValueError, match=r"delta must be \[17, 48\] float32 on cpu, got \[1, 48\]"):
            call(w.x, w.delta[:1], w.norm1)
        with pytest.raises(ValueError, match=r"delta must be .* float32 on cpu, got \[17, 48\] float64"):
            call(w.x, w.delta.double(), w.norm1)
        with pytest.raises(ValueError, match=r"norm\.weight must be \[48\] float32 on cpu, got \[40\]"):
            call(w.x, None, w.norm1._replace(weight=torch.ones(40)))
    with pytest.raises(ValueError, match=r"linear\.weight must be \[144, 48\] .* float64 on cpu"):
        add_norm_linear(w.x, None, w.norm1, linear(144, 48, dtype=torch.float64))


@pytest.mark.usefixtures("use")
def test_vectors_need_not_be_dense() -> None:
    w = Weights(torch.float32)
    expected = torch.autograd.grad(by_hand(w, None, True).square().sum(), w.x)
    for name in ("norm1", "norm2", "qkv", "proj", "fc1", "fc2"):
        layer = getattr(w, name)
        bias = torch.stack([layer.bias, layer.bias], dim=1)[:, 0]
        vectors = {"bias": bias}
        if isinstance(layer, Norm):
            vectors["weight"] = torch.stack([layer.weight, layer.weight], dim=1)[:, 0]
        setattr(w, name, layer._replace(**vectors))
    found = torch.autograd.grad(by_hand(w, None, True).square().sum(), w.x)
    torch.testing.assert_close(found, expected)


def test_tensors_without_memory_are_not_taken_for_one() -> None:
    one, other = torch.empty(2, 3, device="meta"), torch.empty(2, 3, device="meta")
    assert block._are_one(one, one)
    assert not block._are_one(one, other)
    real = torch.zeros(2, 4)
    assert block._are_one(real[:, :2], real[:, :2])
    assert not block._are_one(real[:, :2], real[:, 2:])


def test_a_second_derivative_is_refused() -> None:
    w = Weights(torch.float64)
    (dx,) = torch.autograd.grad(by_hand(w, None, True).square().sum(), w.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()

import math
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastjepa_kernels as fk
from fastjepa_kernels import attention_stock, attention_triton_backward, attention_triton_forward
from fastjepa_kernels.attention_triton import (
    Tile,
    backward_tile,
    backward_tiles,
    counts_in_int32,
    forward_tile,
    in_eights,
)

IMPLEMENTATIONS = fk.implementations("packed_attention", "cpu")
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@pytest.fixture
def use(implementation: str) -> Iterator[str]:
    # The extension has no other precision than fp32, and heads in sixteens: the next best runs the rest.
    with fk.use(implementation, strict=implementation != "cpp"):
        yield implementation


def widest(implementation: str) -> torch.dtype:
    return torch.float32 if implementation in ("cpp", "triton") else torch.float64


def attention_one_by_one(qkv: Tensor, lengths: list[int], scale: float) -> Tensor:
    """softmax(scale * q k^T) v of each sequence and head, as matrices; zero past the last sequence."""
    tokens, _, heads, _ = qkv.shape
    out = torch.zeros_like(qkv[:, 0])
    for start, end in pairwise(accumulate(lengths, initial=0)):
        for head in range(heads):
            query, key, value = (qkv[start:end, part, head] for part in range(3))
            out[start:end, head] = torch.softmax(scale * query @ key.t(), dim=1) @ value
    return out


def starts_of(lengths: list[int]) -> Tensor:
    return torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32)


def check(
    lengths: list[int],
    dtype: torch.dtype,
    *,
    past_the_end: int = 0,
    heads: int = 1,
    head_dim: int = 8,
    slack: int = 0,
    scale: float | None = None,
    seed: int = 0,
    tolerance: float | None = None,
) -> None:
    """Output and gradient against the same numbers in fp64, sequence by sequence."""
    random = torch.Generator().manual_seed(seed)
    shape = (sum(lengths) + past_the_end, 3, heads, head_dim)
    qkv = torch.randn(shape, generator=random).to(dtype).requires_grad_()
    exact = qkv.detach().double().requires_grad_()
    upstream = torch.randn(shape[0], *shape[2:], generator=random).to(dtype)
    expected = attention_one_by_one(exact, lengths, 1 / math.sqrt(head_dim) if scale is None else scale)
    (wanted,) = torch.autograd.grad(expected, exact, upstream.double(), allow_unused=True)
    wanted = torch.zeros_like(exact) if wanted is None else wanted

    out = fk.packed_attention(qkv, starts_of(lengths), max(lengths) + slack, scale)
    (gradient,) = torch.autograd.grad(out, qkv, upstream)
    assert out.dtype == gradient.dtype == dtype
    bound = tolerance or 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=bound, atol=bound)
    # A score is a sum of head_dim products, and its rounding is multiplied into the gradient.
    spread = max(1.0, head_dim * abs(1 / math.sqrt(head_dim) if scale is None else scale))
    torch.testing.assert_close(gradient.double(), wanted, rtol=bound, atol=bound * spread)


SHAPES: dict[str, Any] = {
    "lengths": st.lists(st.integers(0, 9), min_size=1, max_size=4),
    "past_the_end": st.integers(0, 3),
    "heads": st.integers(1, 2),
    "head_dim": st.sampled_from([8, 24, 32, 64]),
    "slack": st.integers(0, 20),
    "scale": st.none() | st.floats(-1, 1),
    "seed": st.integers(0, 2**31),
}


@pytest.mark.parametrize("implementation", ["sdpa", "torch"])
@pytest.mark.usefixtures("use")
@settings(deadline=None, max_examples=30)
@given(**SHAPES)
def test_it_is_sequence_by_sequence(implementation: str, lengths: list[int], **shape: Any) -> None:
    check(lengths, torch.float64, **shape)


@pytest.mark.skipif("triton" not in IMPLEMENTATIONS, reason="needs Triton")
@settings(deadline=None, max_examples=8)  # its interpreter is slow
@given(**SHAPES)
def test_the_kernels_are_sequence_by_sequence(lengths: list[int], **shape: Any) -> None:
    with fk.use("triton", strict=True):
        check(lengths, torch.float32, **shape)


@each_implementation
@pytest.mark.usefixtures("use")
@pytest.mark.parametrize("head_dim", [80, 88, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_wide_heads(implementation: str, head_dim: int, dtype: torch.dtype) -> None:
    if implementation == "triton" and dtype == torch.float32:
        with pytest.raises(ValueError, match="packed_attention_backward cannot run as 'triton'"):
            check([5, 0, 3], dtype, head_dim=head_dim)
        return
    check([5, 0, 3], dtype, heads=2, head_dim=head_dim, past_the_end=2, tolerance=5e-3)


# Each kernel and each tile: whole sequences of up to 64, 128 and 256 tokens, and blocks beyond.
@each_implementation
@pytest.mark.usefixtures("use")
@pytest.mark.parametrize(
    ("lengths", "head_dim"),
    [
        ([64, 1, 0, 33], 24),
        ([70, 128, 5], 32),
        ([90, 3], 64),
        ([200, 7], 8),
        ([150, 7], 64),
        ([300, 0, 65], 8),
    ],
)
def test_half_precision_is_as_good_as_its_rounding(
    implementation: str, lengths: list[int], head_dim: int
) -> None:
    check(lengths, torch.float16, head_dim=head_dim, past_the_end=5, tolerance=5e-3)


@pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="needs fastjepa_kernels._C")
@settings(deadline=None, max_examples=60)
@given(
    **SHAPES
    | {
        "lengths": st.lists(st.integers(0, 70), min_size=1, max_size=4),
        "head_dim": st.sampled_from([16, 32, 48, 64, 80, 128]),
    },
)
def test_the_extension_is_sequence_by_sequence(lengths: list[int], **shape: Any) -> None:
    with fk.use("cpp", strict=True):
        check(lengths, torch.float32, **shape)


@pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="needs fastjepa_kernels._C")
def test_the_extension_reads_rows_that_are_apart() -> None:
    wide = torch.randn(21, 3, 2, 70)
    qkv, starts = wide[..., 3:67], starts_of([17, 4])
    with fk.use("cpp", strict=True):
        found = fk.packed_attention(qkv, starts, 17)
        assert torch.equal(found, fk.packed_attention(qkv.contiguous(), starts, 17))


@pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="needs fastjepa_kernels._C")
def test_a_nan_stays_in_its_sequence_and_head() -> None:
    qkv = torch.randn(20, 3, 2, 16)
    qkv[3, 0, 1, 5] = torch.nan
    with fk.use("cpp", strict=True):
        out = fk.packed_attention(qkv, starts_of([12, 8]), 12)
    wrong = torch.zeros(20, 2, dtype=torch.bool)
    wrong[3, 1] = True
    assert torch.equal(out.isnan().any(-1), wrong)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="needs fastjepa_kernels._C")
def test_the_extension_has_the_same_bits_on_any_number_of_threads(threads: int) -> None:
    qkv, starts = torch.randn(40, 3, 4, 32), starts_of([17, 4, 19])
    with fk.use("cpp", strict=True):
        expected = fk.packed_attention(qkv, starts, 19)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            assert torch.equal(fk.packed_attention(qkv, starts, 19), expected)
        finally:
            torch.set_num_threads(before)


@each_implementation
@pytest.mark.usefixtures("use")
def test_a_long_sequence_among_short_ones(implementation: str) -> None:
    check([3, 290, 0, 1], widest(implementation), past_the_end=40)


@pytest.mark.skipif("triton" not in IMPLEMENTATIONS, reason="needs Triton")
@pytest.mark.parametrize("tile", [Tile(16, 32, 4), Tile(32, 16, 4)])
def test_the_kernels_for_half_precision_are_exact_in_fp32(
    tile: Tile, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In fp32 they would spill on a GPU and are not used, but rounding hides less there.
    monkeypatch.setattr(attention_triton_forward, "forward_tile", lambda *_: (tile, tile.keys == 32))
    monkeypatch.setattr(
        attention_triton_backward, "backward_tile", lambda *_: tile if tile.keys == 32 else None
    )
    monkeypatch.setattr(attention_triton_backward, "backward_tiles", lambda *_: (tile, tile))
    for implementation in ("triton", "torch"):
        with fk.use(implementation, strict=True):
            check([32, 0, 1, 17], torch.float32, heads=2, head_dim=24, past_the_end=37)


@each_implementation
@pytest.mark.parametrize("backward", IMPLEMENTATIONS)
def test_forward_and_backward_may_run_differently(implementation: str, backward: str) -> None:
    lengths, starts, scale = [5, 0, 2], starts_of([5, 0, 2]), 0.3
    qkv = torch.randn(8, 3, 2, 16, requires_grad=True)
    dout = torch.randn(8, 2, 16)
    (expected,) = torch.autograd.grad(attention_one_by_one(qkv, lengths, scale), qkv, dout)
    arguments = (starts, 6, scale)
    out, lse = torch.ops.fastjepa.packed_attention(qkv, *arguments, f"{implementation}!")
    scores = torch.einsum("qhd,khd->hqk", *qkv[:5, :2].unbind(1)) * scale
    torch.testing.assert_close(lse[:, :5], scores.logsumexp(2))
    assert bool((lse[:, 7:] == 0).all())
    found = torch.ops.fastjepa.packed_attention_backward(dout, qkv, out, lse, *arguments, f"{backward}!")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("implementation", ["sdpa", "torch"])
@pytest.mark.usefixtures("use")
def test_gradients_are_those_of_differences(implementation: str) -> None:
    qkv = torch.randn(6, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    starts = starts_of([3, 0, 1, 1])  # and a row past the end
    assert torch.autograd.gradcheck(lambda qkv: fk.packed_attention(qkv, starts, 3, 0.7), (qkv,))


@each_implementation
@pytest.mark.usefixtures("use")
def test_one_token_attends_to_itself(implementation: str) -> None:
    qkv = torch.randn(4, 3, 2, 16)
    out = fk.packed_attention(qkv, starts_of([1, 1, 1, 1]), 1)
    torch.testing.assert_close(out, qkv[:, 2], rtol=0, atol=1e-6)


@each_implementation
@pytest.mark.usefixtures("use")
@pytest.mark.parametrize("scale", [0.0, 1e-35, -2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_scale(implementation: str, scale: float, dtype: torch.dtype) -> None:
    check([4, 3], dtype, scale=scale, tolerance=1e-5 if dtype == torch.float32 else 1e-2)


@each_implementation
@pytest.mark.usefixtures("use")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("lengths", "max_seqlen"),
    [([3, 2], 3), ([3, 2], 5), ([2, 3], 300), ([0, 0], 3), ([0, 0], 0), ([], 3), ([], 0)],
)
def test_rows_past_the_end_are_zero_whatever_is_in_them(
    implementation: str, dtype: torch.dtype, lengths: list[int], max_seqlen: int
) -> None:
    qkv = torch.randn(7, 3, 1, 8).to(dtype).requires_grad_()
    end = sum(lengths)
    with torch.no_grad():
        qkv[end:] = float("nan")
    out = fk.packed_attention(qkv, starts_of(lengths), max_seqlen)
    assert bool((out[end:] == 0).all())
    assert bool(out.isfinite().all())
    upstream = torch.randn(7, 1, 8).to(dtype)
    upstream[end:] = float("nan")
    out.backward(upstream)
    assert qkv.grad is not None
    assert bool((qkv.grad[end:] == 0).all())
    assert bool(qkv.grad.isfinite().all())


@each_implementation
@pytest.mark.usefixtures("use")
def test_no_rows_at_all(implementation: str) -> None:
    qkv = torch.randn(0, 3, 2, 8, requires_grad=True)
    out = fk.packed_attention(qkv, starts_of([0, 0]), 4)
    out.sum().backward()
    assert out.shape == (0, 2, 8)
    assert qkv.grad is not None


@each_implementation
@pytest.mark.usefixtures("use")
@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter, in the sequences beside
def test_sequences_do_not_see_each_other(implementation: str) -> None:
    qkv = torch.randn(9, 3, 2, 8)
    alone = fk.packed_attention(qkv[3:7], starts_of([4]), 4)
    with torch.no_grad():
        qkv[:3], qkv[7:] = float("nan"), float("inf")
    out = fk.packed_attention(qkv, starts_of([3, 4, 2]), 4)
    torch.testing.assert_close(out[3:7], alone, rtol=0, atol=1e-6)


# Views of tensors of other shapes that are [10, 3, 2, 24].
LAYOUTS = {
    "tokens, heads, parts": ((10, 2, 3, 24), lambda x: x.transpose(1, 2)),
    "a slice": ((13, 3, 4, 40), lambda x: x[2:-1, :, 1:-1, 8:-8]),
    "columns": ((24, 2, 3, 10), lambda x: x.permute(3, 2, 1, 0)),
    "odd rows": ((10, 3, 2, 27), lambda x: x[..., 1:-2]),
}


@each_implementation
@pytest.mark.usefixtures("use")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strided_input_gets_the_same_result_and_gradient(
    implementation: str, layout: str, dtype: torch.dtype
) -> None:
    shape, view = LAYOUTS[layout]
    strided = view(torch.randn(shape).to(dtype)).requires_grad_()
    assert not strided.is_contiguous()
    plain = strided.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    upstream = torch.randn(24, 2, 10).to(dtype).permute(2, 1, 0)
    for qkv in (strided, plain):
        fk.packed_attention(qkv, starts_of([6, 4]), 8).backward(upstream)
    out, expected = (fk.packed_attention(qkv, starts_of([6, 4]), 8) for qkv in (strided, plain))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(strided.grad, plain.grad)


@each_implementation
@pytest.mark.usefixtures("use")
def test_an_expanded_gradient(implementation: str) -> None:
    qkv = torch.randn(5, 3, 2, 8, requires_grad=True)
    out = fk.packed_attention(qkv, starts_of([3, 2]), 3)
    (of_sum,) = torch.autograd.grad(out.sum(), qkv, retain_graph=True)
    (of_ones,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    torch.testing.assert_close(of_sum, of_ones)


@each_implementation
@pytest.mark.usefixtures("use")
def test_two_runs_give_the_same_bits(implementation: str) -> None:
    qkv = torch.randn(40, 3, 2, 8, requires_grad=True)
    upstream = torch.randn(40, 2, 8)
    runs = []
    for _ in range(2):
        out = fk.packed_attention(qkv, starts_of([20, 0, 13]), 20)
        runs.append((out, *torch.autograd.grad(out, qkv, upstream)))
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


@each_implementation
def test_both_ops_are_what_they_declare(implementation: str) -> None:
    starts = starts_of([3, 0, 2])
    qkv, dout = torch.randn(6, 3, 2, 16, requires_grad=True), torch.randn(6, 2, 16)
    ops = torch.ops.fastjepa
    torch.library.opcheck(ops.packed_attention.default, (qkv, starts, 4, 0.3, f"{implementation}!"))
    out, lse = ops.packed_attention(qkv.detach(), starts, 4, 0.3, f"{implementation}!")
    arguments = (dout, qkv.detach(), out, lse, starts, 4, 0.3, f"{implementation}!")
    torch.library.opcheck(ops.packed_attention_backward.default, arguments)


@each_implementation
@pytest.mark.usefixtures("use")
def test_compiled_it_is_the_same(implementation: str) -> None:
    def loss(qkv: Tensor, starts: Tensor) -> Tensor:
        return fk.packed_attention(qkv * 2, starts, 6).square().sum()

    qkv = torch.randn(9, 3, 2, 8, requires_grad=True)
    starts = starts_of([6, 0, 2])
    value = loss(qkv, starts)
    (gradient,) = torch.autograd.grad(value, qkv)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(qkv, starts)
    (compiled_gradient,) = torch.autograd.grad(compiled, qkv)
    torch.testing.assert_close((compiled, compiled_gradient), (value, gradient), rtol=0, atol=0)


@each_implementation
@pytest.mark.usefixtures("use")
def test_products_are_counted(implementation: str) -> None:
    qkv = torch.randn(9, 3, 2, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out = fk.packed_attention(qkv, starts_of([5, 0, 3]), 7)
        assert counter.get_total_flops() == 4 * 8 * 2 * (25 + 9)
        out.sum().backward()
    assert counter.get_total_flops() == 14 * 8 * 2 * (25 + 9)


def test_without_values_products_are_counted_by_the_bound() -> None:
    qkv = torch.randn(9, 3, 2, 8, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        fk.packed_attention(qkv, starts_of([5, 0, 3]).to("meta"), 7).sum().backward()
    assert counter.get_total_flops() == 14 * 8 * 2 * (3 * 49)


@each_implementation
@pytest.mark.usefixtures("use")
def test_a_second_derivative_is_refused(implementation: str) -> None:
    qkv = torch.randn(3, 3, 1, 8, requires_grad=True)
    out = fk.packed_attention(qkv, starts_of([3]), 3)
    (gradient,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="packed_attention has no second derivative"):
        gradient.sum().backward()


@given(st.integers(1, 16), st.integers(1, 4096), st.sampled_from([80, 86, 90, 100, 120, 942]))
def test_tiles_hold_what_their_kernels_need(eighths: int, max_seqlen: int, architecture: int) -> None:
    head_dim = 8 * eighths
    for size in (2, 4):
        tile, whole = forward_tile(head_dim, max_seqlen, architecture, size)
        assert not whole or tile.keys >= max_seqlen
        of_all = backward_tile(head_dim, max_seqlen, architecture, size)
        assert of_all is None or of_all.keys >= max_seqlen
        for each in (tile, of_all or tile, *backward_tiles(head_dim, architecture, size)):
            assert all(number >= 16 and number.bit_count() == 1 for number in (each.queries, each.keys))
            assert each.num_warps in (4, 8, 16)
            assert architecture != 942 or "maxnreg" not in each.launch  # unknown there


QKV, STARTS = torch.zeros(5, 3, 2, 8), torch.tensor([0, 2, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"qkv": QKV[0]}, r"qkv must be \[T, 3, H, d\]"),
        ({"qkv": QKV[:, :2]}, r"qkv must be \[T, 3, H, d\]"),
        ({"qkv": QKV.long()}, "qkv must be floating point"),
        ({"qkv": QKV[..., :4]}, "multiple of 8 up to 128, got 4"),
        ({"qkv": torch.zeros(5, 3, 1, 136)}, "multiple of 8 up to 128, got 136"),
        ({"qkv": QKV[..., :0]}, "multiple of 8 up to 128, got 0"),
        ({"cu_seqlens": STARTS.long()}, "cu_seqlens must be int32"),
        ({"cu_seqlens": STARTS[None]}, r"cu_seqlens must be int32 \[sequences \+ 1\]"),
        ({"cu_seqlens": STARTS[:0]}, "cu_seqlens must be int32"),
        ({"cu_seqlens": STARTS + 1}, "must start at 0, got 1"),
        ({"cu_seqlens": STARTS[[0, 2, 1]]}, "must never decrease"),
        ({"cu_seqlens": STARTS * 2}, "ends at 10, but there are only 5"),
        ({"max_seqlen": 2}, "max_seqlen must be an upper bound: it is 2, a sequence has 3"),
        ({"max_seqlen": -1}, "max_seqlen must be 0 or more"),
        ({"cu_seqlens": STARTS.to("meta")}, "one device, got qkv on cpu, cu_seqlens on meta"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fk.packed_attention(**{"qkv": QKV, "cu_seqlens": STARTS, "max_seqlen": 3, **arguments})


@pytest.mark.parametrize("starts", [[0, 9, 24], [-3, 12, 24], [5, 12, 24], [0, 4000, 12], [30, 2, 9]])
def test_on_a_gpu_wrong_cu_seqlens_are_no_wrong_index(
    starts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where a look at the values would wait for the device, they are not checked. What comes out means
    # nothing, but an index outside would end the context of a GPU; here it raises.
    monkeypatch.setattr("fastjepa_kernels.attention.require_cu_seqlens_values", lambda *_arguments: None)
    qkv = torch.randn(24, 3, 1, 8, requires_grad=True)
    with fk.use("torch", strict=True):
        fk.packed_attention(qkv, torch.tensor(starts, dtype=torch.int32), 8).sum().backward()


def test_starts_for_others_kernels_stay_within_the_stream() -> None:
    starts = torch.tensor([-3, 12, 5, 4000], dtype=torch.int32)
    assert attention_stock._within(starts, 24).tolist() == [0, 12, 12, 24]


def test_views_too_far_apart_for_int32_are_copied() -> None:
    def strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        return torch.empty(1, device="meta").as_strided(shape, strides)

    near = strides((4, 3, 2, 8), (16, 64, 8, 1))
    assert in_eights(near) is near
    far = strides((4, 3, 2, 8), (16, 2**30, 8, 1))
    assert in_eights(far) is not far
    heads = strides((4, 3, 5, 8), (24, 8, 2**29, 1))
    assert in_eights(heads) is not heads


@pytest.mark.skipif("triton" not in IMPLEMENTATIONS, reason="needs Triton")
def test_kernels_that_count_in_int32_get_no_stream_too_long_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert counts_in_int32(2**20, 2**11 - 1)
    assert not counts_in_int32(2**20, 8, 2**11)
    for module in (attention_triton_forward, attention_triton_backward):
        monkeypatch.setattr(module, "counts_in_int32", lambda *_: False)
    for kernel in (
        (attention_triton_forward, "forward_whole"),
        (attention_triton_backward, "backward_whole"),
    ):
        monkeypatch.setattr(*kernel, None)
    with fk.use("triton", strict=True):
        check([9, 0, 5], torch.float16, head_dim=24, past_the_end=2, tolerance=2**-8)


def test_equal_lengths_are_the_caller_s_word_and_are_checked_where_it_costs_nothing() -> None:
    qkv = torch.randn(12, 3, 2, 8)
    starts = starts_of([4, 4, 4])
    assert torch.equal(fk.packed_attention(qkv, starts, 4, equal=True), fk.packed_attention(qkv, starts, 4))
    with pytest.raises(ValueError, match="not all of equal length 4"):
        fk.packed_attention(qkv, starts_of([4, 3, 4]), 4, equal=True)
    with pytest.raises(ValueError, match="do not fill 12 tokens"):
        fk.packed_attention(qkv, starts_of([4, 4]), 4, equal=True)

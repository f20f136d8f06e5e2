import math
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastjepa_kernels as fk


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


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    past_the_end=st.integers(0, 3),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([8, 24, 32, 80, 88, 128]),
    slack=st.integers(0, 20),
    scale=st.none() | st.floats(0.01, 1),
    seed=st.integers(0, 2**31),
)
def test_it_is_sequence_by_sequence(
    lengths: list[int],
    past_the_end: int,
    heads: int,
    head_dim: int,
    slack: int,
    scale: float | None,
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    shape = (sum(lengths) + past_the_end, 3, heads, head_dim)
    qkv = torch.randn(shape, dtype=torch.float64, generator=random, requires_grad=True)
    out = fk.packed_attention(qkv, starts_of(lengths), max(lengths) + slack, scale)
    expected = attention_one_by_one(qkv, lengths, 1 / math.sqrt(head_dim) if scale is None else scale)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)

    weights = torch.randn(out.shape, dtype=torch.float64, generator=random)
    (gradient,) = torch.autograd.grad((out * weights).sum(), qkv)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), qkv, allow_unused=True)
    wanted = torch.zeros_like(qkv) if wanted is None else wanted
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-11)


def test_gradients_are_those_of_differences() -> None:
    qkv = torch.randn(6, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    starts = starts_of([3, 0, 1, 1])  # and a row past the end
    assert torch.autograd.gradcheck(lambda qkv: fk.packed_attention(qkv, starts, 3, 0.7), (qkv,))


def test_one_token_attends_to_itself() -> None:
    qkv = torch.randn(4, 3, 2, 16)
    out = fk.packed_attention(qkv, starts_of([1, 1, 1, 1]), 1)
    torch.testing.assert_close(out, qkv[:, 2], rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("lengths", "max_seqlen"), [([3, 2], 3), ([3, 2], 5), ([0, 0], 3), ([0, 0], 0), ([], 3), ([], 0)]
)
def test_rows_past_the_end_are_zero_whatever_is_in_them(lengths: list[int], max_seqlen: int) -> None:
    qkv = torch.randn(7, 3, 1, 8, requires_grad=True)
    end = sum(lengths)
    with torch.no_grad():
        qkv[end:] = float("nan")
    out = fk.packed_attention(qkv, starts_of(lengths), max_seqlen)
    assert bool((out[end:] == 0).all())
    assert bool(out.isfinite().all())
    out.sum().backward()
    assert qkv.grad is not None
    assert bool((qkv.grad[end:] == 0).all())
    assert bool(qkv.grad.isfinite().all())


def test_sequences_do_not_see_each_other() -> None:
    qkv = torch.randn(9, 3, 2, 8)
    alone = fk.packed_attention(qkv[3:7], starts_of([4]), 4)
    with torch.no_grad():
        qkv[:3], qkv[7:] = float("nan"), float("inf")
    out = fk.packed_attention(qkv, starts_of([3, 4, 2]), 4)
    assert torch.equal(out[3:7], alone)


def test_strided_input_gets_the_same_result_and_gradient() -> None:
    fused = torch.randn(10, 2, 3, 24, dtype=torch.float64, requires_grad=True)  # as [T, H, 3, d]
    strided = fused.transpose(1, 2)
    assert not strided.is_contiguous()
    out = fk.packed_attention(strided, starts_of([6, 4]), 8)
    plain = strided.detach().contiguous().requires_grad_()
    expected = fk.packed_attention(plain, starts_of([6, 4]), 8)
    assert torch.equal(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert fused.grad is not None
    assert plain.grad is not None
    torch.testing.assert_close(fused.grad.transpose(1, 2), plain.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_as_good_as_its_rounding(dtype: torch.dtype) -> None:
    lengths = [60, 113, 1]
    qkv = torch.randn(174, 3, 2, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = fk.packed_attention(qkv, starts_of(lengths), 120)
    assert out.dtype == dtype
    expected = attention_one_by_one(qkv.double(), lengths, 24**-0.5)
    assert float((out.double() - expected).abs().max()) < 4 * torch.finfo(dtype).eps


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

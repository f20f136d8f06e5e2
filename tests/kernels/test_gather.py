from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastjepa_kernels as fk

IMPLEMENTATIONS = fk.implementations("gather_tokens", "cpu")
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@pytest.fixture
def use(implementation: str) -> Iterator[str]:
    with fk.use(implementation, strict=True):
        yield implementation


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nothing was written to reads as NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def widest(implementation: str) -> torch.dtype:
    return torch.float32 if implementation == "triton" else torch.float64


def rows_one_by_one(x: Tensor, index: Tensor, pos: Tensor | None) -> Tensor:
    rows = [
        torch.stack([x[b, k] + (0 if pos is None else pos[k]) for k in index[b].tolist()])
        for b in range(len(x))
    ]
    return torch.stack(rows)


@each_implementation
@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 7),
    st.integers(1, 12),
    st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_it_is_row_by_row(
    implementation: str,
    batch: int,
    grid: int,
    width: int,
    kept: int,
    index_dtype: torch.dtype,
    with_pos: bool,
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    dtype = widest(implementation)
    x = torch.randn(batch, grid, width, dtype=dtype, generator=random).requires_grad_()
    pos = torch.randn(grid, width, dtype=dtype, generator=random).requires_grad_() if with_pos else None
    index = torch.randint(grid, (batch, kept), generator=random)  # repeats where kept > grid
    starts = torch.arange(batch + 1, dtype=torch.int32) * kept
    expected = rows_one_by_one(x, index, pos)
    upstream = torch.randn(expected.shape, dtype=dtype, generator=random)
    leaves = [x] if pos is None else [x, pos]
    gradients = torch.autograd.grad(expected, leaves, upstream)

    with fk.use(implementation, strict=True):
        dense = fk.gather_tokens(x, index.to(index_dtype), pos)
        packed = fk.gather_tokens(x, index.flatten().to(index_dtype), pos, starts)
        assert torch.equal(dense, expected)
        assert torch.equal(packed, expected.flatten(0, 1))
        for out in (dense, packed):
            found = torch.autograd.grad(out, leaves, upstream.view(out.shape))
            torch.testing.assert_close(found, gradients)


@each_implementation
@pytest.mark.usefixtures("use")
def test_images_of_unequal_length_and_of_none() -> None:
    x = torch.randn(4, 5, 3)
    lists = [[4, 0], [], [2, 2, 1], []]
    index = torch.tensor([k for kept in lists for k in kept])
    starts = torch.tensor([0, 2, 2, 5, 5], dtype=torch.int32)
    out = fk.gather_tokens(x, index, cu_seqlens=starts)
    for image, (start, end) in enumerate(pairwise(starts.tolist())):
        assert torch.equal(out[start:end], x[image, lists[image]])
    assert fk.gather_tokens(x, index[:0], cu_seqlens=torch.zeros(5, dtype=torch.int32)).shape == (0, 3)
    assert fk.gather_tokens(x, torch.zeros(4, 0, dtype=torch.long)).shape == (4, 0, 3)


@each_implementation
@pytest.mark.usefixtures("use")
def test_rows_past_the_end_are_zero_and_so_is_their_gradient() -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    pos = torch.randn(3, 4, requires_grad=True)
    starts = torch.tensor([0, 1, 2], dtype=torch.int32)
    out = fk.gather_tokens(x, torch.tensor([0, 1, 2, 2]), pos, starts)
    assert bool((out[2:] == 0).all())
    upstream = torch.ones_like(out)
    upstream[2:] = torch.nan
    out.backward(upstream)
    assert x.grad is not None
    assert pos.grad is not None
    assert x.grad.sum() == pos.grad.sum() == 2 * 4
    assert bool((x.grad[:, 2] == 0).all())
    assert bool((pos.grad[2] == 0).all())


@each_implementation
@pytest.mark.usefixtures("use")
def test_strides_do_not_matter() -> None:
    x = torch.randn(6, 4, 3).permute(2, 1, 0)[:, ::2]  # [3, 2, 6]
    pos = torch.randn(6, 2).t()
    index = torch.tensor([[1, 0], [1, 1], [0, 1]]).t().contiguous().t()
    assert not any(tensor.is_contiguous() for tensor in (x, pos, index))
    assert torch.equal(fk.gather_tokens(x, index, pos), rows_one_by_one(x, index, pos))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "triton"])
@pytest.mark.usefixtures("use")
def test_first_and_second_gradients(packed: bool) -> None:
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    pos = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[3, 3, 0], [1, 3, 1]])
    starts = torch.tensor([0, 3, 6], dtype=torch.int32) if packed else None
    kept = index.flatten() if packed else index
    assert torch.autograd.gradcheck(lambda x, pos: fk.gather_tokens(x, kept, pos, starts), (x, pos))
    assert torch.autograd.gradgradcheck(lambda x, pos: fk.gather_tokens(x, kept, pos, starts), (x, pos))
    fk.gather_tokens(x, kept, None, starts).sum().backward()
    assert x.grad is not None
    assert x.grad[..., 0].tolist() == [[1, 0, 0, 2], [0, 2, 0, 1]]


@each_implementation
def test_the_gradient_of_positions_is_summed_over_many_images(implementation: str) -> None:
    # More images than the parts that the sum is made in, and not a multiple of them.
    x = torch.randn(37, 5, 8)
    index = torch.randint(5, (37, 3))
    upstream = torch.randn(37, 3, 8)
    pos = torch.randn(5, 8, requires_grad=True)
    with fk.use(implementation, strict=True):
        (found,) = torch.autograd.grad(fk.gather_tokens(x, index, pos), pos, upstream)
    exact = torch.zeros(5, 8, dtype=torch.float64).index_add_(
        0, index.flatten(), upstream.double().flatten(0, 1)
    )
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@each_implementation
@pytest.mark.usefixtures("use")
def test_half_precision_and_the_same_bits_twice() -> None:
    x = torch.randn(3, 11, 40).half().requires_grad_()
    index = torch.randint(11, (3, 20))
    upstream = torch.randn(3, 20, 40).half()
    out = fk.gather_tokens(x, index)
    assert torch.equal(out, x.gather(1, index[..., None].expand(-1, -1, 40)))
    first, second = (torch.autograd.grad(out, x, upstream, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    exact = torch.zeros(3, 11, 40, dtype=torch.float64)
    exact.scatter_add_(1, index[..., None].expand(-1, -1, 40), upstream.double())
    # Summed wider than fp16, so that only the last rounding shows.
    torch.testing.assert_close(first.double(), exact, rtol=2**-11, atol=2**-12)


@each_implementation
@pytest.mark.usefixtures("use")
def test_positions_of_the_same_precision_are_added_before_the_cast() -> None:
    x, pos = torch.randn(2, 4, 8).half(), torch.randn(4, 8).half()
    index = torch.tensor([[0, 3], [2, 1]])
    exact = rows_one_by_one(x.double(), index, pos.double())
    torch.testing.assert_close(fk.gather_tokens(x, index, pos, dtype=torch.float32), exact.float())


@each_implementation
@pytest.mark.usefixtures("use", "poisoned")
@pytest.mark.parametrize("width", [40, 64, 130])
def test_every_element_is_written(width: int) -> None:
    x, pos = torch.randn(3, 19, width, requires_grad=True), torch.randn(19, width)
    index = torch.randint(19, (3, 11), dtype=torch.int32)
    out = fk.gather_tokens(x, index, pos)
    assert torch.equal(out, rows_one_by_one(x, index, pos))
    (found,) = torch.autograd.grad(out, x, torch.ones_like(out))
    taken = torch.zeros(3, 19).scatter_add_(1, index.long(), torch.ones(3, 11))
    assert torch.equal(found, taken[..., None].expand(-1, -1, width))


@pytest.mark.parametrize("implementation", ["triton"])
@pytest.mark.usefixtures("use", "poisoned")
def test_on_a_gpu_wrong_values_read_and_write_nothing_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where a look at the values would wait for the device, they are not checked.
    for check in ("require_index_values", "require_cu_seqlens_values"):
        monkeypatch.setattr(f"fastjepa_kernels.gather.{check}", lambda *_arguments: None)
    x = torch.randn(2, 4, 8, requires_grad=True)
    index = torch.tensor([[1, -1, 4], [2**32, 0, 2**31 - 1]])
    out = fk.gather_tokens(x, index)
    assert torch.equal(out[0, 0], x[0, 1])
    assert torch.equal(out[1, 1], x[1, 0])
    assert bool((out[[0, 0, 1, 1], [1, 2, 0, 2]] == 0).all())
    (found,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert found[..., 0].tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]

    kept, beyond = torch.tensor([0, 3, 1]), torch.tensor([0, 2, 5000], dtype=torch.int32)
    surroundings = torch.full((5000, 8), torch.nan)
    surroundings[:3] = 1
    packed = fk.gather_tokens(x, kept, cu_seqlens=beyond)
    assert torch.equal(packed, x[[0, 0, 1], kept])
    (found,) = torch.autograd.grad(packed, x, surroundings[:3])
    assert found[..., 0].tolist() == [[1, 0, 0, 1], [0, 1, 0, 0]]


@each_implementation
@pytest.mark.usefixtures("use")
def test_nothing_to_take_or_to_take_from() -> None:
    index, none = torch.zeros(5, dtype=torch.long), torch.zeros(1, dtype=torch.int32)
    assert torch.equal(fk.gather_tokens(torch.randn(0, 3, 4), index, cu_seqlens=none), torch.zeros(5, 4))
    x = torch.randn(2, 3, 0, requires_grad=True)
    fk.gather_tokens(x, index.view(5, 1)[:2]).sum().backward()
    x = torch.randn(2, 3, 4, requires_grad=True)
    fk.gather_tokens(x, index.view(5, 1)[:2, :0]).sum().backward()
    assert x.grad is not None
    assert bool((x.grad == 0).all())


def test_tangents_are_refused_not_dropped() -> None:
    x = torch.randn(1, 3, 4)
    with pytest.raises(NotImplementedError, match="gather_tokens cannot be differentiated in forward mode"):
        torch.func.jvp(lambda x: fk.gather_tokens(x, torch.tensor([[0]])), (x,), (x,))


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "triton"])
@pytest.mark.usefixtures("use")
def test_positions_are_added_before_the_cast() -> None:
    x = torch.randn(2, 4, 8).bfloat16()
    pos = torch.randn(4, 8)
    index = torch.tensor([[0, 3], [2, 1]])
    exact = rows_one_by_one(x.double(), index, pos.double())
    assert torch.equal(fk.gather_tokens(x, index, pos, dtype=torch.float32), exact.float())
    out = fk.gather_tokens(x, index, pos)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, exact.float().bfloat16())
    assert fk.gather_tokens(x, index, dtype=torch.float64).dtype == torch.float64


@each_implementation
@pytest.mark.usefixtures("use")
@pytest.mark.parametrize("packed", [False, True])
def test_the_op_is_registered_as_torch_wants_it(packed: bool) -> None:
    x = torch.randn(2, 5, 6, requires_grad=True)
    pos = torch.randn(5, 6, requires_grad=True)
    index = torch.tensor([[0, 3, 3], [4, 1, 2]])
    starts = torch.tensor([0, 2, 5], dtype=torch.int32) if packed else None
    kept = index.flatten() if packed else index
    name = fk.choice.preference()
    torch.library.opcheck(torch.ops.fastjepa.gather_tokens, (x, kept, pos, starts, torch.float32, name))
    upstream = torch.randn(*kept.shape, 6, requires_grad=True)
    torch.library.opcheck(
        torch.ops.fastjepa.gather_tokens_backward, (upstream, kept, starts, 2, 5, 2, torch.float32, name)
    )


def test_it_compiles_without_a_break() -> None:
    x = torch.randn(2, 5, 6, requires_grad=True)
    pos = torch.randn(5, 6, requires_grad=True)
    index = torch.tensor([[0, 3, 3], [4, 1, 2]], dtype=torch.int32)

    def loss(x: Tensor, pos: Tensor) -> Tensor:
        return fk.gather_tokens(2 * x, index, pos).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(x, pos), (x, pos))
    assert torch.equal(compiled(x, pos), loss(x, pos))
    assert all(map(torch.equal, torch.autograd.grad(compiled(x, pos), (x, pos)), expected))


def test_flop_counters_see_it() -> None:
    x = torch.randn(2, 5, 6, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        fk.gather_tokens(x, torch.tensor([[0, 3], [4, 1]])).sum().backward()
    seen = counter.get_flop_counts()["Global"]
    assert seen[torch.ops.fastjepa.gather_tokens] == 0
    assert seen[torch.ops.fastjepa.gather_tokens_backward] == 0


X, INDEX = torch.zeros(2, 4, 3), torch.zeros(2, 2, dtype=torch.long)
STARTS = torch.tensor([0, 2, 4], dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(4, 3)}, r"x must be \[B, N, D\]"),
        ({"x": X.long()}, "x must be floating point"),
        ({"index": INDEX.float()}, "index must hold integers"),
        ({"index": INDEX.bool()}, "index must hold integers"),
        ({"index": INDEX + 4}, r"index must lie in 0\.\.3, got 4\.\.4"),
        ({"index": INDEX - 1}, r"index must lie in 0\.\.3, got -1\.\.-1"),
        ({"index": INDEX[:1]}, r"index must be \[B, K\] with B = 2"),
        ({"index": INDEX.flatten()}, r"index must be \[B, K\]"),
        ({"pos": torch.zeros(3, 3)}, r"pos must be \[N, D\] = \[4, 3\]"),
        ({"pos": torch.zeros(4, 3, dtype=torch.long)}, "pos must be floating point"),
        ({"dtype": torch.int64}, "dtype must be floating point"),
        ({"cu_seqlens": STARTS}, r"with cu_seqlens, index must be \[T\]"),
        ({"index": INDEX.flatten(), "cu_seqlens": STARTS.long()}, "cu_seqlens must be int32"),
        ({"index": INDEX.flatten(), "cu_seqlens": STARTS[:2]}, r"B \+ 1 = 3 entries, got 2"),
        ({"index": INDEX.flatten(), "cu_seqlens": STARTS + 1}, "must start at 0"),
        ({"index": INDEX.flatten(), "cu_seqlens": STARTS.flip(0) - 4}, "must start at 0|never decrease"),
        ({"index": INDEX.flatten(), "cu_seqlens": STARTS[[0, 2, 1]]}, "never decrease"),
        ({"index": INDEX.flatten()[:3], "cu_seqlens": STARTS}, "ends at 4, but there are only 3"),
        ({"pos": torch.zeros(4, 3, device="meta")}, "one device, got .*pos on meta"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fk.gather_tokens(**{"x": X, "index": INDEX, **arguments})

"""The ops of the optional extension against plain torch; how they are chosen is in the tests of each op."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastjepa_kernels import native

pytestmark = pytest.mark.skipif(not native.HAS_CPP, reason="fastjepa_kernels._C is not built: make ext")

QUICK = settings(deadline=None, max_examples=30)
SHORT = [torch.bfloat16, torch.float16]
FLOATS = [torch.float64, torch.float32, *SHORT]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
# A rounding of what was computed in fp32 (or fp64) by both, in another order.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def ops() -> Any:
    return torch.ops.fastjepa_native


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------- ema_update_


@QUICK
@given(
    sizes=st.lists(st.sampled_from([0, 1, 7, 8, 31, 1024, 1025, 2500]), min_size=1, max_size=6),
    source_dtype=st.sampled_from([torch.float32, *SHORT]),
    working_dtype=st.sampled_from([None, torch.float32, *SHORT]),
    weight=st.sampled_from([0.0, 0.004, 0.4999, 0.5, 0.7, 1.0]),
)
def test_ema_has_the_bits_of_lerp(
    sizes: list[int], source_dtype: torch.dtype, working_dtype: torch.dtype | None, weight: float
) -> None:
    shadow = [torch.randn(size) for size in sizes]
    source = [torch.randn(size).to(source_dtype) for size in sizes]
    working = []
    if working_dtype is not None:
        working = [torch.full((size,), torch.nan, dtype=working_dtype) for size in sizes]
    expected = [t.lerp(s.float(), weight) for t, s in zip(shadow, source, strict=True)]
    ops().ema_update_(shadow, source, weight, working)
    for i, average in enumerate(expected):
        assert torch.equal(shadow[i], average)
        if working:
            assert torch.equal(working[i], average.to(working_dtype))


@pytest.mark.parametrize("dtype", SHORT)
def test_ema_rounds_what_is_special_as_torch_does(dtype: torch.dtype) -> None:
    low = torch.finfo(dtype).smallest_normal
    special = [
        torch.nan,
        -torch.nan,
        torch.inf,
        -torch.inf,
        0.0,
        -0.0,
        65504.0,
        65520.0,
        3.4e38,
        1e-8,
        low,
        low / 3,
    ]
    shadow = torch.tensor(special)
    working = torch.empty_like(shadow, dtype=dtype)
    ops().ema_update_([shadow.clone()], [shadow], 0.25, [working])
    expected = shadow.lerp(shadow, 0.25).to(dtype)
    torch.testing.assert_close(working, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(
        working.signbit(), expected.signbit() & ~expected.isnan() | working.signbit() & working.isnan()
    )


def test_ema_does_not_depend_on_threads(threads: Any) -> None:
    sizes = (100_003, 5, 40_000, 70_001)
    before, source = [torch.randn(size) for size in sizes], [torch.randn(size) for size in sizes]
    results = []
    for count in (1, 2):
        threads(count)
        shadow = [tensor.clone() for tensor in before]
        ops().ema_update_(shadow, source, 0.3, [])
        results.append(torch.cat(shadow))
    assert torch.equal(*results)
    assert torch.equal(results[0], torch.cat(before).lerp(torch.cat(source), 0.3))


def test_ema_refuses_and_writes_nothing() -> None:
    good = torch.ones(4, 3)
    for shadow, source, working in (
        ([good, good], [torch.zeros(4, 3)], []),
        ([good], [torch.zeros(4, 3)], [torch.zeros(4, 3)] * 2),
        ([good, torch.ones(2)], [torch.zeros(4, 3), torch.zeros(3)], []),
        ([good, torch.ones(2).double()], [torch.zeros(4, 3), torch.zeros(2)], []),
        ([good, torch.ones(2)], [torch.zeros(4, 3), torch.zeros(2).long()], []),
        ([good, torch.ones(3, 4).t()], [torch.zeros(4, 3)] * 2, []),
    ):
        with pytest.raises(ValueError, match=r"as many tensors|tensors \d must be"):
            ops().ema_update_(shadow, source, 0.5, working)
        assert torch.equal(good, torch.ones(4, 3))


# ------------------------------------------------------------------------------------ gather_tokens


@st.composite
def gathers(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """x [B, N, D], index [B, K] or [T], pos [N, D] or None, cu_seqlens or None, of any types and strides."""
    batch, patches, width = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 40))
    dtype = draw(st.sampled_from(FLOATS))
    layout = draw(st.sampled_from(["contiguous", "cut", "transposed"]))
    if layout == "contiguous":
        x = torch.randn(batch, patches, width)
    elif layout == "cut":
        x = torch.randn(batch, patches + 1, width + 3)[:, 1:, :width]
    else:
        x = torch.randn(batch, width, patches).transpose(1, 2)
    pos = torch.randn(patches, width).to(draw(st.sampled_from(FLOATS))) if draw(st.booleans()) else None
    lengths = torch.tensor([draw(st.integers(0, 7)) for _ in range(batch)])
    if draw(st.booleans()):
        index, cu_seqlens = torch.randint(patches, (batch, int(lengths[0]))), None
    else:
        cu_seqlens = torch.cat([torch.zeros(1).long(), lengths.cumsum(0)]).int()
        index = torch.randint(patches, (int(cu_seqlens[-1]) + draw(st.integers(0, 3)),))
    index = torch.stack([index, index], dim=-1)[..., 0].to(draw(st.sampled_from(INTEGERS)))
    return x.to(dtype), index, pos, cu_seqlens


def images_of(index: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """int64, the image of each token that has one."""
    if cu_seqlens is None:
        return torch.arange(len(index)).repeat_interleave(index.shape[1])
    return torch.arange(len(cu_seqlens) - 1).repeat_interleave(cu_seqlens.diff().long())


@QUICK
@given(gathers(), st.sampled_from(FLOATS))
def test_gather_takes_rows(
    given: tuple[Tensor, Tensor, Tensor | None, Tensor | None], dtype: torch.dtype
) -> None:
    x, index, pos, cu_seqlens = given
    image, flat = images_of(index, cu_seqlens), index.long().flatten()
    expected = torch.zeros(flat.numel(), x.shape[2], dtype=torch.float64)
    taken = flat[: len(image)]
    expected[: len(image)] = x[image, taken].double()
    if pos is not None:
        expected[: len(image)] += pos[taken].double()
    found = ops().gather_tokens(x, index, pos, cu_seqlens, dtype)
    assert found.dtype == dtype
    assert_close(found, expected.view(*index.shape, x.shape[2]))
    if pos is None and x.dtype == dtype:
        assert torch.equal(found.flatten(0, -2).double(), expected)


@QUICK
@given(gathers(), st.sampled_from(FLOATS), st.integers(1, 5))
def test_gather_backward_adds_up_what_was_taken(
    given: tuple[Tensor, Tensor, Tensor | None, Tensor | None], dtype: torch.dtype, images_per_sum: int
) -> None:
    x, index, _, cu_seqlens = given
    batch, patches, width = x.shape
    image, flat = images_of(index, cu_seqlens), index.long().flatten()
    grad = torch.randn(*index.shape, width).to(x.dtype)
    sums = -(-batch // images_per_sum)
    expected = torch.zeros(sums * patches, width, dtype=torch.float64)
    rows = image // images_per_sum * patches + flat[: len(image)]
    expected.index_add_(0, rows, grad.flatten(0, -2)[: len(image)].double())
    found = ops().gather_tokens_backward(grad, index, cu_seqlens, batch, patches, images_per_sum, dtype)
    assert found.dtype == dtype
    assert_close(found, expected.view(sums, patches, width))


def test_gather_does_not_depend_on_threads(threads: Any) -> None:
    x, grad = torch.randn(8, 50, 300), torch.randn(8, 70, 300)
    index = torch.randint(50, (8, 70))
    results = []
    for count in (1, 2):
        threads(count)
        taken = ops().gather_tokens(x, index, torch.ones(50, 300), None, torch.float32)
        each = ops().gather_tokens_backward(grad, index, None, 8, 50, 1, torch.float32)
        whole = ops().gather_tokens_backward(grad, index, None, 8, 50, 8, torch.bfloat16)
        results.append((taken, each, whole))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": torch.tensor([[0, 5]])}, r"index must lie in 0\.\.4, got 0\.\.5"),
        ({"index": torch.tensor([[-1, 0]])}, r"index must lie in 0\.\.4, got -1\.\.0"),
        ({"index": torch.tensor([[0.0, 1.0]])}, "index must hold integers"),
        ({"index": torch.zeros(2, 2).long()}, r"index must be \[B, K\] with B = 1"),
        ({"cu_seqlens": torch.tensor([0, 2]).int()}, r"index must be \[T\] and cu_seqlens"),
        ({"index": torch.zeros(4).long(), "cu_seqlens": torch.tensor([0, 2])}, "int32"),
        ({"index": torch.zeros(4).long(), "cu_seqlens": torch.tensor([1, 2]).int()}, "start at 0"),
        ({"index": torch.zeros(4).long(), "cu_seqlens": torch.tensor([0, 5]).int()}, "nor pass T = 4"),
        ({"index": torch.zeros(4).long(), "cu_seqlens": torch.tensor([0, -1]).int()}, "never decrease"),
    ],
)
def test_gather_refuses(change: dict[str, Tensor], message: str) -> None:
    index, cu_seqlens = change.get("index", torch.zeros(1, 2).long()), change.get("cu_seqlens")
    with pytest.raises(ValueError, match=message):
        ops().gather_tokens(torch.randn(1, 5, 3), index, None, cu_seqlens, torch.float32)
    grad = torch.randn(*index.shape, 3)
    with pytest.raises(ValueError, match=message):
        ops().gather_tokens_backward(grad, index, cu_seqlens, 1, 5, 1, torch.float32)


def test_gather_backward_refuses_another_shape() -> None:
    index = torch.zeros(1, 2).long()
    with pytest.raises(ValueError, match="grad must be"):
        ops().gather_tokens_backward(torch.randn(1, 3, 4), index, None, 1, 5, 1, torch.float32)
    with pytest.raises(ValueError, match="images_per_sum above 0"):
        ops().gather_tokens_backward(torch.randn(1, 2, 4), index, None, 1, 5, 0, torch.float32)


# --------------------------------------------------------------------------------------- jepa_loss


@QUICK
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(2, 70)),
    dtypes=st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)),
    index_dtype=st.sampled_from(INTEGERS),
    affine=st.tuples(st.booleans(), st.booleans()),
    beta=st.sampled_from([0.05, 1.0, 3.0]),
)
def test_loss_and_its_slope(
    sizes: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype],
    index_dtype: torch.dtype,
    affine: tuple[bool, bool],
    beta: float,
) -> None:
    blocks, batch, tokens, width = sizes
    prediction = torch.randn(sizes).to(dtypes[0])
    hidden = torch.randn(batch, 9, width + 1).to(dtypes[1])[..., 1:]
    index = torch.randint(9, sizes[:3]).to(index_dtype)
    weight, bias = (torch.randn(width) if given else None for given in affine)
    loss, slope = ops().jepa_loss(prediction, hidden, index, weight, bias, 1e-6, 1e-5, beta, True)

    image = torch.arange(batch)[:, None].expand(blocks, batch, tokens)
    target = hidden.double()[image, index.long()]
    own_weight, own_bias = (None if given is None else given.double() for given in (weight, bias))
    target = F.layer_norm(target, (width,), own_weight, own_bias, 1e-6)
    target = F.layer_norm(target, (width,), eps=1e-5)
    z = prediction.double().requires_grad_()
    expected = F.smooth_l1_loss(z, target, beta=beta)
    expected.backward()

    work = torch.float64 if torch.float64 in dtypes else torch.float32
    assert loss.shape == ()
    assert loss.dtype == work
    assert slope.dtype == dtypes[0]
    tolerance = 1e-9 if work == torch.float64 else 1e-4  # two norms of a few numbers lose digits
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=tolerance, atol=tolerance)
    assert z.grad is not None
    tolerance = max(tolerance / beta, TOLERANCE[dtypes[0]])
    torch.testing.assert_close(slope.double(), z.grad * z.numel(), rtol=tolerance, atol=tolerance)
    again, nothing = ops().jepa_loss(prediction, hidden, index, weight, bias, 1e-6, 1e-5, beta, False)
    assert torch.equal(again, loss)
    assert nothing.numel() == 0


def test_loss_does_not_depend_on_threads(threads: Any) -> None:
    prediction, hidden = torch.randn(3, 4, 40, 200), torch.randn(4, 60, 200)
    index = torch.randint(60, (3, 4, 40))
    results = []
    for count in (1, 2):
        threads(count)
        results.append(ops().jepa_loss(prediction, hidden, index, None, None, 1e-6, 1e-5, 1.0, True))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_loss_passes_nan_on() -> None:
    prediction = torch.randn(1, 1, 2, 8)
    prediction[0, 0, 1, 3] = torch.nan
    index = torch.zeros(1, 1, 2).long()
    loss, slope = ops().jepa_loss(prediction, torch.randn(1, 4, 8), index, None, None, 1e-6, 1e-5, 1.0, True)
    assert loss.isnan()
    assert torch.equal(slope.isnan(), prediction.isnan())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": torch.randn(2, 1, 3, 5)}, "prediction must be"),
        ({"prediction": torch.randn(2, 1, 0, 4)}, "not empty"),
        ({"hidden": torch.randn(2, 6, 4)}, r"hidden \[B, N, D\]"),
        ({"index": torch.full((2, 1, 3), 6)}, r"index must lie in 0\.\.5"),
        ({"index": torch.zeros(2, 1, 2).long()}, r"index must be \[M, B, P\]"),
        ({"weight": torch.ones(5)}, "norm_weight and norm_bias"),
        ({"beta": 0.0}, "beta must be above 0"),
    ],
)
def test_loss_refuses(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "prediction": torch.randn(2, 1, 3, 4),
        "hidden": torch.randn(1, 6, 4),
        "index": torch.zeros(2, 1, 3).long(),
        "weight": None,
        "beta": 1.0,
    } | change
    beta = given.pop("beta")
    with pytest.raises(ValueError, match=message):
        ops().jepa_loss(*given.values(), None, 1e-6, 1e-5, beta, True)


# ------------------------------------------------------------------------------------ the extension

FORK = """
import os, signal, torch
from fastjepa_kernels import native

torch.set_num_threads(2)
shadow, source = torch.randn(200_000), torch.randn(200_000)
update = torch.ops.fastjepa_native.ema_update_
update([shadow], [source], 0.3, [])
expected = shadow.lerp(source, 0.3)
child = os.fork()
if child == 0:
    signal.alarm(20)  # ends it if it hangs
    update([shadow], [source], 0.3, [])
    os._exit(0 if torch.get_num_threads() == 2 else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
update([shadow], [source], 0.3, [])
assert torch.equal(shadow, expected)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes are not forked")
def test_a_forked_child_does_not_wait_for_threads_it_has_not() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_where_there_is_cuda_code_it_waits_for_a_gpu() -> None:
    assert hasattr(ops(), "ema_update_cuda_") == native.HAS_CUDA
    if native.HAS_CUDA:
        with pytest.raises(NotImplementedError, match="CPU"):
            ops().ema_update_cuda_([torch.ones(3)], [torch.zeros(3)], 0.5, None, [])

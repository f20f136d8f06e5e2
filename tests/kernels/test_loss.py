import math
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastjepa_kernels as fk

IMPLEMENTATIONS = fk.implementations("jepa_loss", "cpu")
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
each_in_float64 = pytest.mark.parametrize(
    "implementation", [name for name in IMPLEMENTATIONS if name != "triton"]
)


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


def normed(row: list[float], eps: float) -> list[float]:
    mean = sum(row) / len(row)
    variance = sum((value - mean) ** 2 for value in row) / len(row)
    return [(value - mean) / math.sqrt(variance + eps) for value in row]


def loss_one_by_one(
    prediction: Tensor,
    hidden: Tensor,
    index: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    beta: float = 1.0,
) -> float:
    """The definition in Python floats, one element after another."""
    total = 0.0
    for m, b, p in torch.cartesian_prod(*(torch.arange(side) for side in index.shape)).tolist():
        row = normed(hidden[b, int(index[m, b, p])].tolist(), 1e-6)
        if weight is not None:
            row = [value * scale for value, scale in zip(row, weight.tolist(), strict=True)]
        if bias is not None:
            row = [value + shift for value, shift in zip(row, bias.tolist(), strict=True)]
        for guess, actual in zip(prediction[m, b, p].tolist(), normed(row, 1e-5), strict=True):
            distance = abs(guess - actual)
            total += distance**2 / (2 * beta) if distance < beta else distance - beta / 2
    return total / prediction.numel()


def inputs(
    seed: int,
    blocks: int = 2,
    batch: int = 3,
    grid: int = 5,
    tokens: int = 2,
    width: int = 6,
    dtype: torch.dtype = torch.float64,
) -> Any:
    random = torch.Generator().manual_seed(seed)
    prediction = 2 * torch.randn(blocks, batch, tokens, width, dtype=torch.float64, generator=random)
    hidden = torch.randn(batch, grid, width, dtype=torch.float64, generator=random)
    index = torch.randint(grid, (blocks, batch, tokens), generator=random)
    weight = 1 + torch.randn(width, dtype=torch.float64, generator=random) / 4
    bias = torch.randn(width, dtype=torch.float64, generator=random) / 4
    return prediction.to(dtype), hidden.to(dtype), index, weight.to(dtype), bias.to(dtype)


@each_implementation
@settings(deadline=None, max_examples=25)
@given(
    sizes=st.tuples(*(st.integers(1, high) for high in (3, 3, 6, 4, 9))),
    beta=st.sampled_from([1.0, 0.3, 2.0]),
    index_dtype=st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]),
    with_weight=st.booleans(),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_it_is_element_by_element(
    implementation: str,
    sizes: tuple[int, int, int, int, int],
    beta: float,
    index_dtype: torch.dtype,
    with_weight: bool,
    with_bias: bool,
    seed: int,
) -> None:
    dtype = widest(implementation)
    prediction, hidden, index, weight, bias = inputs(seed, *sizes, dtype=dtype)
    weight, bias = weight if with_weight else None, bias if with_bias else None
    with fk.use(implementation, strict=True):
        out = fk.jepa_loss(prediction, hidden, index.to(index_dtype), weight, bias, beta=beta)
    assert out.dtype == dtype
    assert out.shape == ()
    expected = loss_one_by_one(prediction, hidden, index, weight, bias, beta)
    # With one element a row is its own mean, and the rest of it is rounding.
    rel, close = (1e-11, 1e-13) if dtype == torch.float64 else (1e-5, 1e-6)
    assert float(out) == pytest.approx(expected, rel=rel, abs=close)


def by_plain_torch(
    prediction: Tensor, hidden: Tensor, index: Tensor, weight: Tensor | None, bias: Tensor | None, beta: float
) -> Tensor:
    width = hidden.shape[-1]
    rows = torch.stack([hidden[b, index[:, b]] for b in range(len(hidden))], dim=1)  # [M, B, P, D]
    target = F.layer_norm(rows, (width,), weight, bias, 1e-6)
    return F.smooth_l1_loss(prediction, F.layer_norm(target, (width,), eps=1e-5), beta=beta)


@each_implementation
@settings(deadline=None, max_examples=25)
@given(
    sizes=st.tuples(*(st.integers(1, high) for high in (3, 3, 6, 4, 40))),
    beta=st.sampled_from([1.0, 0.3, 2.0]),
    with_norm=st.booleans(),
    scale=st.sampled_from([1.0, -1024.0]),
    seed=st.integers(0, 2**31),
)
def test_its_gradient_is_that_of_plain_torch(
    implementation: str,
    sizes: tuple[int, int, int, int, int],
    beta: float,
    with_norm: bool,
    scale: float,
    seed: int,
) -> None:
    prediction, hidden, index, weight, bias = inputs(seed, *sizes)
    if not with_norm:
        weight = bias = None
    prediction.requires_grad_()
    expected = torch.autograd.grad(by_plain_torch(prediction, hidden, index, weight, bias, beta), prediction)
    dtype = widest(implementation)
    with fk.use(implementation, strict=True):
        guess = prediction.detach().to(dtype).requires_grad_()
        norm = (None, None) if weight is None else (weight.to(dtype), bias.to(dtype))
        loss = fk.jepa_loss(guess, hidden.to(dtype), index, norm[0], norm[1], beta=beta)
        (found,) = torch.autograd.grad(scale * loss, guess)
    assert found.dtype == dtype
    rtol, atol = (1e-9, 1e-12) if dtype == torch.float64 else (1e-4, 1e-5)
    torch.testing.assert_close(found.double() / scale, expected[0], rtol=rtol, atol=atol)


@each_implementation
@pytest.mark.parametrize("width", [1, 24, 130, 1280])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.usefixtures("use", "poisoned")
def test_every_element_is_written(width: int, dtype: torch.dtype) -> None:
    prediction, hidden, index, weight, bias = inputs(5, batch=5, tokens=3, width=width)
    guess = prediction.to(dtype).requires_grad_()
    loss = fk.jepa_loss(guess, hidden.to(dtype), index, weight.to(dtype), bias.to(dtype))
    (found,) = torch.autograd.grad(1024 * loss, guess)
    exact = prediction.to(dtype).double().requires_grad_()
    hidden, weight, bias = (tensor.to(dtype).double() for tensor in (hidden, weight, bias))
    expected = by_plain_torch(exact, hidden, index, weight, bias, 1.0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6, check_dtype=False)
    (gradient,) = torch.autograd.grad(1024 * expected, exact)
    # Of the roundings of slope and gradient, half an eps each, and of fp32 arithmetic.
    allowed = gradient.abs().max() * (torch.finfo(dtype).eps + 3e-6)
    assert bool(((found.double() - gradient).abs() <= allowed).all())


@each_implementation
@pytest.mark.usefixtures("use", "poisoned")
def test_without_a_gradient_there_is_no_slope() -> None:
    prediction, hidden, index, weight, bias = inputs(6, dtype=torch.float32)
    arguments = (prediction, hidden, index, weight, bias, 1e-6, 1e-5, 1.0)
    with_slope, slope = torch.ops.fastjepa.jepa_loss(*arguments, True, False, fk.choice.preference())
    alone, nothing = torch.ops.fastjepa.jepa_loss(*arguments, False, False, fk.choice.preference())
    assert slope.shape == prediction.shape
    assert nothing.numel() == 0
    assert torch.equal(alone, with_slope)
    prediction.requires_grad_()
    with torch.no_grad():
        assert not fk.jepa_loss(prediction, hidden, index, weight, bias).requires_grad
    without, _ = torch.ops.fastjepa.jepa_loss(*arguments, False, False, fk.choice.preference())
    with pytest.raises(ValueError, match="need_gradient=False"):
        without.backward()


@each_implementation
@pytest.mark.usefixtures("use")
def test_both_norms_have_an_epsilon_of_their_own() -> None:
    prediction, hidden, index, weight, bias = inputs(0, dtype=torch.float32)
    hidden = hidden * 1e-3  # a variance near the epsilons, which then count
    plain = float(fk.jepa_loss(prediction, hidden, index, weight, bias))
    assert plain == pytest.approx(loss_one_by_one(prediction, hidden, index, weight, bias), rel=1e-5)
    other = float(fk.jepa_loss(prediction, hidden, index, weight, bias, norm_eps=1e-5))
    assert plain != pytest.approx(other, rel=1e-4)
    tiny = weight * 1e-3, bias * 1e-3
    assert float(fk.jepa_loss(prediction, hidden, index, *tiny)) != pytest.approx(
        float(fk.jepa_loss(prediction, hidden, index, *tiny, target_eps=1e-6)), rel=1e-4
    )


@each_in_float64
@pytest.mark.usefixtures("use")
def test_only_the_prediction_gets_a_gradient() -> None:
    prediction, hidden, index, weight, bias = inputs(1)
    for tensor in (prediction, hidden, weight, bias):
        tensor.requires_grad_()
    fk.jepa_loss(prediction, hidden, index, weight, bias).backward()
    assert prediction.grad is not None
    assert hidden.grad is weight.grad is bias.grad is None

    def loss(guess: Tensor) -> Tensor:
        return fk.jepa_loss(guess, hidden, index, weight, bias, beta=0.5)

    assert torch.autograd.gradcheck(loss, (prediction.detach().requires_grad_(),))
    # Far from the target, the gradient is that of the absolute value over the number of elements.
    far = (prediction.detach() + 100).requires_grad_()
    loss(far).backward()
    torch.testing.assert_close(far.grad, torch.full_like(far, 1 / far.numel()))
    with pytest.raises(RuntimeError, match="does not require grad"):
        fk.jepa_loss(prediction.detach(), hidden, index, weight, bias).backward()


@each_implementation
@pytest.mark.usefixtures("use")
def test_a_kept_graph_gives_its_gradient_again() -> None:
    prediction, hidden, index, weight, bias = inputs(7, dtype=torch.float32)
    prediction.requires_grad_()
    loss = fk.jepa_loss(prediction, hidden, index, weight, bias)
    first = torch.autograd.grad(loss, prediction, retain_graph=True)[0]
    kept = first.clone()
    twice = torch.autograd.grad(loss, prediction, torch.tensor(2.0), retain_graph=True)[0]
    last = torch.autograd.grad(loss, prediction)[0]  # which may take the slope's memory
    assert torch.equal(first, kept)
    assert torch.equal(last, kept)
    assert torch.equal(twice, 2 * kept)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, prediction)


refused = pytest.raises(NotImplementedError, match="jepa_loss has no second derivative")


@each_implementation
@pytest.mark.usefixtures("use")
def test_a_second_derivative_is_refused() -> None:
    prediction, hidden, index, weight, bias = inputs(8, dtype=torch.float32)

    def loss(prediction: Tensor) -> Tensor:
        return fk.jepa_loss(prediction, hidden, index, weight, bias)

    with refused:
        torch.autograd.functional.hvp(loss, prediction, torch.ones_like(prediction))
    prediction.requires_grad_()
    scale = torch.tensor(2.0, requires_grad=True)
    for each in (
        loss,
        lambda prediction: scale * loss(prediction),
        lambda prediction: checkpoint(loss, prediction, use_reentrant=False),
        torch.compile(loss, fullgraph=True, backend="eager"),
    ):
        out = each(prediction)
        with refused:  # a gradient penalty
            torch.autograd.grad(out, prediction, create_graph=True)


@each_implementation
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.usefixtures("use")
def test_it_can_be_checkpointed(reentrant: bool) -> None:
    prediction, hidden, index, weight, bias = inputs(17, dtype=torch.float32)
    prediction.requires_grad_()

    def loss(prediction: Tensor) -> Tensor:
        return fk.jepa_loss(2 * prediction, hidden, index, weight, bias)

    (expected,) = torch.autograd.grad(loss(prediction), prediction)
    checkpoint(loss, prediction, use_reentrant=reentrant).backward()
    assert prediction.grad is not None
    assert torch.equal(prediction.grad, expected)


@each_implementation
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.usefixtures("use")
def test_several_gradients_at_once() -> None:
    prediction, hidden, index, weight, bias = inputs(18, dtype=torch.float32)
    prediction.requires_grad_()

    def gradients(upstream: Tensor, batched: bool = False) -> Tensor:
        loss = fk.jepa_loss(prediction, hidden, index, weight, bias)
        return torch.autograd.grad(loss, prediction, [upstream], is_grads_batched=batched)[0]

    upstream = torch.tensor([1.0, -2.0, 3.0])
    expected = torch.stack([gradients(each) for each in upstream])
    assert torch.equal(gradients(upstream, batched=True), expected)
    assert torch.equal(torch.vmap(gradients)(upstream), expected)


@each_implementation
@pytest.mark.usefixtures("use")
def test_a_compiled_step_may_hold_the_backward_pass() -> None:
    prediction, hidden, index, weight, bias = inputs(19, dtype=torch.float32)

    def step(prediction: Tensor) -> None:
        fk.jepa_loss(prediction, hidden, index, weight, bias).backward()

    expected, found = (prediction.clone().requires_grad_() for _ in range(2))
    step(expected)
    torch.compile(step, backend="eager")(found)
    assert found.grad is not None
    assert torch.equal(found.grad, expected.grad)


@pytest.mark.usefixtures("poisoned")
def test_where_torch_does_not_say_whether_the_graph_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    prediction, hidden, index, weight, bias = inputs(20)
    prediction.requires_grad_()

    def gradient() -> tuple[Tensor, bool]:
        with FlopCounterMode(display=False) as counter:
            fk.jepa_loss(prediction, hidden, index, weight, bias).backward()
        found, prediction.grad = prediction.grad, None
        assert found is not None
        return found, torch.ops.fastjepa.jepa_loss_backward_ in counter.get_flop_counts()["Global"]

    expected, in_place = gradient()
    assert in_place
    monkeypatch.delattr(torch._C._autograd, "_get_current_graph_task_keep_graph")
    found, in_place = gradient()
    assert not in_place
    assert torch.equal(found, expected)


@each_implementation
@pytest.mark.usefixtures("use")
def test_forward_mode_is_refused() -> None:
    prediction, hidden, index, weight, bias = inputs(21, dtype=torch.float32)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(prediction, torch.ones_like(prediction))
        with pytest.raises(NotImplementedError, match="jepa_loss cannot be differentiated in forward mode"):
            fk.jepa_loss(dual, hidden, index, weight, bias)


@each_implementation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_only_that_of_the_inputs(implementation: str, dtype: torch.dtype) -> None:
    if implementation == "triton" and dtype == torch.bfloat16:
        dtype = torch.float32  # the interpreter has no bf16
    prediction, hidden, index, weight, bias = inputs(2, width=64)
    prediction, hidden, weight, bias = (t.to(dtype) for t in (prediction, hidden, weight, bias))
    with fk.use(implementation, strict=True):
        out = fk.jepa_loss(prediction, hidden, index, weight, bias)
    assert out.dtype == torch.float32
    exact = fk.jepa_loss(prediction.double(), hidden.double(), index, weight.double(), bias.double())
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=0)


@each_implementation
@pytest.mark.usefixtures("use")
def test_a_large_batch_does_not_lose_the_gradient_in_fp16() -> None:
    prediction = 100 + torch.randn(2, 40, 40, 40).half()
    prediction.requires_grad_()
    index = torch.zeros(2, 40, 40, dtype=torch.uint8)
    loss = fk.jepa_loss(prediction, torch.randn(40, 1, 40).half(), index, None, None)
    (found,) = torch.autograd.grad(loss, prediction, torch.tensor(2.0**16))
    # 1 / 128,000 has two digits in fp16; a loss scale of 2^16 over it has all of them.
    expected = torch.full_like(found, 2**16 / prediction.numel())
    assert torch.equal(found, expected)


@each_implementation
@pytest.mark.usefixtures("use")
def test_a_nan_is_not_hidden() -> None:
    prediction, hidden, index, weight, bias = inputs(9, dtype=torch.float32)
    prediction[1, 2, 0, 3] = torch.nan
    prediction.requires_grad_()
    loss = fk.jepa_loss(prediction, hidden, index, weight, bias)
    (found,) = torch.autograd.grad(loss, prediction)
    assert bool(loss.isnan())
    assert torch.equal(found.isnan(), prediction.isnan())


@each_in_float64
@pytest.mark.usefixtures("use")
def test_float64_of_either_input_is_kept() -> None:
    prediction, hidden, index, weight, bias = inputs(3)
    exact = fk.jepa_loss(prediction, hidden.float().double(), index, weight, bias)
    single = prediction.float().requires_grad_()
    mixed = fk.jepa_loss(single, hidden, index, weight, bias)
    assert mixed.dtype == torch.float64
    mixed.backward()
    assert single.grad is not None
    assert single.grad.dtype == torch.float32
    torch.testing.assert_close(fk.jepa_loss(prediction, hidden.float(), index, weight, bias), exact)


@each_implementation
@pytest.mark.usefixtures("use")
def test_strides_do_not_matter() -> None:
    prediction, hidden, index, weight, bias = inputs(4, dtype=torch.float32)
    expected = fk.jepa_loss(prediction, hidden, index, weight, bias)
    strided = fk.jepa_loss(
        prediction.transpose(0, 3).contiguous().transpose(0, 3),
        hidden.transpose(0, 2).contiguous().transpose(0, 2),
        index.transpose(0, 2).contiguous().transpose(0, 2),
        weight.repeat_interleave(2)[::2],
        bias.repeat_interleave(2)[::2],
    )
    torch.testing.assert_close(strided, expected)  # its sums may take another order
    with_class_token = torch.cat([torch.full_like(hidden[:, :1], torch.nan), hidden], dim=1)
    assert torch.equal(fk.jepa_loss(prediction, with_class_token[:, 1:], index, weight, bias), expected)


@each_implementation
@pytest.mark.usefixtures("use")
def test_the_same_bits_twice() -> None:
    random = torch.Generator().manual_seed(10)
    prediction = torch.randn(2, 4, 33, 72, generator=random)
    hidden = torch.randn(4, 9, 72, generator=random)
    index = torch.randint(9, (2, 4, 33), generator=random)
    first, second = (fk.jepa_loss(prediction, hidden, index, None, None) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name == "triton"])
@pytest.mark.usefixtures("use", "poisoned")
def test_on_a_gpu_an_index_out_of_range_reads_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where a look at the values would wait for the device, they are not checked.
    monkeypatch.setattr("fastjepa_kernels.loss.require_index_values", lambda *_arguments: None)
    prediction, hidden, index, weight, bias = inputs(16, dtype=torch.float32)
    index[0, 0, 1], index[1, 2, 0], index[1, 1, 1] = 2**40, -1, 5
    with_zeros = torch.cat([hidden, torch.zeros_like(hidden[:, :1])], dim=1)
    inside = (index >= 0) & (index < 5)
    expected = fk.jepa_loss(prediction, with_zeros, index.where(inside, 5), weight, bias)
    assert torch.equal(fk.jepa_loss(prediction, hidden, index, weight, bias), expected)


def peak_bytes(call: Any) -> int:
    """The most bytes that tensors held at a time during `call`, above those held before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    del kept
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


@each_in_float64
@pytest.mark.usefixtures("use")
def test_nothing_as_large_as_a_normalised_image_is_held() -> None:
    random = torch.Generator().manual_seed(11)
    hidden = torch.randn(2, 4000, 64, generator=random)
    index = torch.randint(4000, (2, 2, 5), generator=random)
    prediction = torch.randn(2, 2, 5, 64, generator=random).requires_grad_()
    size = hidden.numel() * hidden.element_size()
    used = peak_bytes(
        lambda: torch.autograd.grad(fk.jepa_loss(prediction, hidden, index, None, None), prediction)
    )
    assert 0 < used < size / 8


@each_in_float64
@pytest.mark.usefixtures("use")
def test_slope_and_gradient_share_their_memory() -> None:
    random = torch.Generator().manual_seed(12)
    hidden = torch.randn(8, 64, 256, generator=random)
    index = torch.randint(64, (16, 8, 64), generator=random)
    prediction = torch.randn(16, 8, 64, 256, generator=random).requires_grad_()
    size = prediction.numel() * prediction.element_size()
    used = peak_bytes(
        lambda: torch.autograd.grad(fk.jepa_loss(prediction, hidden, index, None, None), prediction)
    )
    # And what is in hand at a time of the rest, which does not grow with the batch.
    assert size <= used < size + 8 * 2**20


@each_implementation
@pytest.mark.usefixtures("use")
@pytest.mark.parametrize("with_norm", [False, True])
def test_the_ops_are_registered_as_torch_wants_them(with_norm: bool) -> None:
    prediction, hidden, index, weight, bias = inputs(13, dtype=torch.float32)
    prediction.requires_grad_()
    norm = (weight, bias) if with_norm else (None, None)
    name = fk.choice.preference()
    rest = (hidden, index, *norm, 1e-6, 1e-5, 0.5)
    torch.library.opcheck(torch.ops.fastjepa.jepa_loss, (prediction, *rest, True, False, name))
    torch.library.opcheck(torch.ops.fastjepa.jepa_loss, (prediction.detach(), *rest, False, True, name))
    slope, upstream = torch.rand(2, 3, 2, 6), torch.rand(())
    torch.library.opcheck(torch.ops.fastjepa.jepa_loss_backward, (slope, upstream, name))
    torch.library.opcheck(torch.ops.fastjepa.jepa_loss_backward_, (slope, upstream, name))


@each_implementation
@pytest.mark.usefixtures("use")
def test_it_compiles_without_a_break() -> None:
    prediction, hidden, index, weight, bias = inputs(14, dtype=torch.float32)
    prediction.requires_grad_()

    def loss(prediction: Tensor, hidden: Tensor) -> Tensor:
        return 3 * fk.jepa_loss(2 * prediction, hidden, index, weight, bias)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(prediction, hidden), loss(prediction, hidden))
    (expected,) = torch.autograd.grad(loss(prediction, hidden), prediction)
    (found,) = torch.autograd.grad(compiled(prediction, hidden), prediction)
    assert torch.equal(found, expected)
    with torch.no_grad():
        assert torch.equal(compiled(prediction, hidden), loss(prediction, hidden))


def test_flop_counters_see_it() -> None:
    prediction, hidden, index, weight, bias = inputs(15)
    prediction.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        loss = fk.jepa_loss(prediction, hidden, index, weight, bias)
        loss.backward(retain_graph=True)
        loss.backward()
    seen = counter.get_flop_counts()["Global"]
    assert seen[torch.ops.fastjepa.jepa_loss] == 0
    assert seen[torch.ops.fastjepa.jepa_loss_backward] == 0
    assert seen[torch.ops.fastjepa.jepa_loss_backward_] == 0


PREDICTION, HIDDEN = torch.zeros(2, 3, 4, 8), torch.zeros(3, 5, 8)
INDEX, NORM = torch.zeros(2, 3, 4, dtype=torch.long), torch.ones(8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prediction": PREDICTION[0]}, r"prediction must be \[M, B, P, D\]"),
        ({"hidden": HIDDEN[0]}, r"hidden must be \[B, N, D\]"),
        ({"prediction": PREDICTION.long()}, "prediction must be floating point"),
        ({"hidden": HIDDEN.long()}, "hidden must be floating point"),
        ({"index": INDEX[:1]}, r"index must be \[M, B, P\] = \[2, 3, 4\]"),
        ({"index": INDEX.float()}, "index must hold integers"),
        ({"index": INDEX + 5}, r"index must lie in 0\.\.4, got 5\.\.5"),
        ({"index": INDEX - 1}, r"index must lie in 0\.\.4"),
        ({"hidden": HIDDEN[:2]}, "must agree in B and D"),
        ({"hidden": HIDDEN[:, :, :4]}, "must agree in B and D"),
        ({"norm_weight": NORM[:4]}, r"norm_weight must be \[D\] with D = 8"),
        ({"norm_bias": NORM[None]}, r"norm_bias must be \[D\]"),
        ({"beta": 0.0}, "beta must be above 0"),
        ({"beta": float("nan")}, "beta must be above 0"),
        ({"prediction": PREDICTION[:, :, :0], "index": INDEX[:, :, :0]}, "prediction is empty"),
        ({"norm_weight": NORM.to("meta")}, "one device, got .*norm_weight on meta"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    given = {"prediction": PREDICTION, "hidden": HIDDEN, "index": INDEX, "norm_weight": NORM}
    with pytest.raises(ValueError, match=message):
        fk.jepa_loss(**{**given, "norm_bias": NORM, **arguments})

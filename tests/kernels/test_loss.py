import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastjepa_kernels as fk


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


def inputs(seed: int, blocks: int = 2, batch: int = 3, grid: int = 5, tokens: int = 2, width: int = 6) -> Any:
    random = torch.Generator().manual_seed(seed)
    prediction = 2 * torch.randn(blocks, batch, tokens, width, dtype=torch.float64, generator=random)
    hidden = torch.randn(batch, grid, width, dtype=torch.float64, generator=random)
    index = torch.randint(grid, (blocks, batch, tokens), generator=random)
    weight = 1 + torch.randn(width, dtype=torch.float64, generator=random) / 4
    bias = torch.randn(width, dtype=torch.float64, generator=random) / 4
    return prediction, hidden, index, weight, bias


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.tuples(*(st.integers(1, high) for high in (3, 3, 6, 4, 9))),
    beta=st.sampled_from([1.0, 0.3, 2.0]),
    index_dtype=st.sampled_from([torch.int64, torch.int32, torch.uint8]),
    with_norm=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_it_is_element_by_element(
    sizes: tuple[int, ...], beta: float, index_dtype: torch.dtype, with_norm: bool, seed: int
) -> None:
    prediction, hidden, index, weight, bias = inputs(seed, *sizes)
    if not with_norm:
        weight = bias = None
    out = fk.jepa_loss(prediction, hidden, index.to(index_dtype), weight, bias, beta=beta)
    assert out.dtype == torch.float64
    assert out.shape == ()
    expected = loss_one_by_one(prediction, hidden, index, weight, bias, beta)
    assert float(out) == pytest.approx(expected, rel=1e-11, abs=1e-13)


def test_both_norms_have_an_epsilon_of_their_own() -> None:
    prediction, hidden, index, weight, bias = inputs(0)
    hidden = hidden * 1e-3  # a variance near the epsilons, which then count
    plain = float(fk.jepa_loss(prediction, hidden, index, weight, bias))
    assert plain == pytest.approx(loss_one_by_one(prediction, hidden, index, weight, bias), rel=1e-11)
    assert plain != pytest.approx(float(fk.jepa_loss(prediction, hidden, index, weight, bias, norm_eps=1e-5)))
    tiny = weight * 1e-3, bias * 1e-3
    assert float(fk.jepa_loss(prediction, hidden, index, *tiny)) != pytest.approx(
        float(fk.jepa_loss(prediction, hidden, index, *tiny, target_eps=1e-6))
    )


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_only_that_of_the_inputs(dtype: torch.dtype) -> None:
    prediction, hidden, index, weight, bias = inputs(2, width=64)
    prediction, hidden, weight, bias = (t.to(dtype) for t in (prediction, hidden, weight, bias))
    out = fk.jepa_loss(prediction, hidden, index, weight, bias)
    assert out.dtype == torch.float32
    exact = fk.jepa_loss(prediction.double(), hidden.double(), index, weight.double(), bias.double())
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=0)


def test_float64_of_either_input_is_kept() -> None:
    prediction, hidden, index, weight, bias = inputs(3)
    assert fk.jepa_loss(prediction.float(), hidden, index, weight, bias).dtype == torch.float64
    assert fk.jepa_loss(prediction, hidden.float(), index, weight, bias).dtype == torch.float64


def test_strides_do_not_matter() -> None:
    prediction, hidden, index, weight, bias = inputs(4)
    strided = fk.jepa_loss(
        prediction.transpose(0, 3).contiguous().transpose(0, 3),
        hidden.transpose(0, 2).contiguous().transpose(0, 2),
        index.transpose(0, 2).contiguous().transpose(0, 2),
        weight.repeat_interleave(2)[::2],
        bias.repeat_interleave(2)[::2],
    )
    # Its sums may take another order.
    torch.testing.assert_close(strided, fk.jepa_loss(prediction, hidden, index, weight, bias))


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

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastjepa_kernels as fk
from fastjepa_kernels.layer_norm import add_layer_norm, add_layer_norm_backward

IMPLEMENTATIONS = fk.implementations("add_layer_norm", "cpu")
EPS = 1e-6


@pytest.fixture(params=IMPLEMENTATIONS)
def use(request: pytest.FixtureRequest) -> Iterator[str]:
    with fk.use(request.param, strict=True):
        yield request.param


def some(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (7, 24), (5, 48), (3, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("has_delta", [False, True])
@pytest.mark.usefixtures("use")
def test_both_passes_against_autograd_in_float64(
    rows: int, width: int, dtype: torch.dtype, has_delta: bool
) -> None:
    x, weight, bias = some(rows, width, dtype=dtype), some(width, dtype=dtype), some(width, dtype=dtype)
    delta = some(rows, width, dtype=dtype) if has_delta else None
    grad, through = some(rows, width, dtype=dtype), some(rows, width, dtype=dtype)
    total, normed, mean, rstd = add_layer_norm(x, delta, weight, bias, EPS)
    assert (total is x) == (delta is None)
    if delta is not None:
        torch.testing.assert_close(total, x + delta)

    wide = [tensor.double().requires_grad_() for tensor in (total, weight, bias)]
    exact = F.layer_norm(wide[0], (width,), wide[1], wide[2], EPS)
    bound = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(normed.double(), exact, rtol=bound, atol=bound)
    dx, dweight, dbias = torch.autograd.grad(exact, wide, grad.double())
    norm = weight, bias, mean, rstd
    found, sums, again = add_layer_norm_backward(grad, through, total, *norm, remake=True)
    assert again is not None
    # Where weight and bias cancel, the rounding of their terms is left, which a fused product may change.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(again, normed, rtol=4 * eps, atol=16 * torch.finfo(torch.float32).eps + eps)
    torch.testing.assert_close(found.double(), dx + through.double(), rtol=bound, atol=bound)
    expected = torch.stack([dweight, dbias, through.double().sum(0), found.double().sum(0)])
    torch.testing.assert_close(sums.double(), expected, rtol=bound, atol=bound * rows)


@pytest.mark.usefixtures("use")
def test_without_another_gradient_of_the_sum() -> None:
    x, weight, bias = torch.randn(4, 16), torch.randn(16), torch.randn(16)
    total, _, mean, rstd = add_layer_norm(x, None, weight, bias, EPS)
    grad = torch.randn(4, 16)
    norm = weight, bias, mean, rstd
    dx, sums, normed = add_layer_norm_backward(grad, None, total, *norm)
    assert normed is None
    with_zeros = add_layer_norm_backward(grad, torch.zeros(4, 16), total, *norm)
    assert torch.equal(dx, with_zeros[0])
    assert torch.equal(sums, with_zeros[1])


@pytest.mark.usefixtures("use")
def test_rows_need_not_be_dense() -> None:
    x, weight, bias = torch.randn(4, 2, 16)[:, 1], torch.randn(16), torch.randn(16)
    _, normed, _, _ = add_layer_norm(x, x, weight, bias, EPS)
    torch.testing.assert_close(normed, F.layer_norm(2 * x, (16,), weight, bias, EPS))


@pytest.mark.usefixtures("use")
def test_a_large_mean_costs_no_precision() -> None:
    x = torch.randn(3, 64) + 1000
    _, normed, _, _ = add_layer_norm(x, None, torch.ones(64), torch.zeros(64), EPS)
    exact = F.layer_norm(x.double(), (64,), eps=EPS)
    torch.testing.assert_close(normed.double(), exact, rtol=1e-4, atol=1e-3)


@pytest.mark.usefixtures("use")
@pytest.mark.parametrize("has_delta", [False, True])
def test_the_sum_of_the_forward_pass_need_not_be_dense(has_delta: bool) -> None:
    """As torch's forward pass keeps it: a view, or a sum with its strides."""
    total = torch.randn(16, 5).t() if has_delta else torch.randn(5, 32)[:, 8:24]
    weight, bias, grad = torch.randn(16), torch.randn(16), torch.randn(5, 16)
    var, mean = torch.var_mean(total, dim=1, correction=0)
    norm = weight, bias, mean, (var + EPS).rsqrt()
    found = add_layer_norm_backward(grad, grad, total, *norm, remake=True)
    expected = add_layer_norm_backward(grad, grad, total.contiguous(), *norm, remake=True)
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("use")
def test_weight_and_bias_need_not_be_dense() -> None:
    x, (weight, bias) = torch.randn(4, 16), torch.randn(16, 2).unbind(1)
    total, normed, mean, rstd = add_layer_norm(x, None, weight, bias, EPS)
    torch.testing.assert_close(normed, F.layer_norm(x, (16,), weight, bias, EPS))
    norm = weight, bias, mean, rstd
    _, _, again = add_layer_norm_backward(torch.randn(4, 16), None, total, *norm, remake=True)
    torch.testing.assert_close(again, normed)

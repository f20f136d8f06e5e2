from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

import fastjepa_kernels as fk
from fastjepa_kernels.column_sums import column_sums, gelu_backward_

IMPLEMENTATIONS = fk.implementations("column_sums", "cpu")
SHAPES = [(1, 1), (3, 8), (70, 300), (33, 257)]


@pytest.fixture(params=IMPLEMENTATIONS)
def use(request: pytest.FixtureRequest) -> Iterator[str]:
    with fk.use(request.param, strict=True):
        yield request.param


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.usefixtures("use")
def test_sums_are_those_of_the_columns(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    sums = column_sums(x)
    assert sums.dtype == dtype
    torch.testing.assert_close(sums.double(), x.double().sum(0), rtol=1e-3, atol=2e-3)


@pytest.mark.usefixtures("use")
def test_no_rows_give_zeros() -> None:
    assert column_sums(torch.empty(0, 5)).tolist() == [0] * 5


@pytest.mark.usefixtures("use")
def test_rows_may_be_apart() -> None:
    x = torch.randn(9, 3, 20)
    torch.testing.assert_close(column_sums(x[:, 1]), x[:, 1].sum(0))


@pytest.mark.usefixtures("use")
def test_columns_may_be_expanded_or_apart() -> None:
    assert column_sums(torch.tensor(2.0).expand(9, 20)).tolist() == [18.0] * 20
    x = torch.randn(20, 9).t()
    torch.testing.assert_close(column_sums(x), x.sum(0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("use")
def test_gelu_s_gradient_is_autograd_s(shape: tuple[int, int]) -> None:
    x, grad = 3 * torch.randn(shape), torch.randn(shape)
    exact = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(F.gelu(exact), exact, grad.double())
    sums, active = gelu_backward_(grad, x, remake=True)
    assert active is not None
    torch.testing.assert_close(active.double(), F.gelu(x.double()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums.double(), expected.sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("use")
def test_gelu_s_gradient_far_out() -> None:
    x = torch.tensor([[-40.0, -9.0, 0.0, 9.0, 40.0]])
    grad = torch.ones_like(x)
    assert gelu_backward_(grad, x, remake=False)[1] is None
    torch.testing.assert_close(grad, torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]]))

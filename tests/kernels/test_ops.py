"""Ops registered without torch's wrapper."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fastjepa_kernels.ops import op


@op("fastjepa_test::double_", mutates=("x", "y"))
def double_(x: Tensor, factor: float, y: Tensor | None) -> None:
    for tensor in (x, y):
        if tensor is not None:
            tensor.data.mul_(factor)  # past autograd, as a kernel writes


@op("fastjepa_test::half")
def half(x: Tensor) -> Tensor:
    return x / 2


half.refuse_gradients()


def test_what_an_op_writes_to_is_of_a_new_version() -> None:
    x, y = torch.ones(3), torch.ones(3)
    leaf = torch.ones(3, requires_grad=True)
    product = leaf * x
    double_(x, 2.0, y)
    assert (x._version, y._version) == (1, 1)
    assert [x.tolist(), y.tolist()] == [[2, 2, 2], [2, 2, 2]]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with torch.inference_mode():
        double_(torch.ones(3), 2.0, None)


def test_an_op_without_a_gradient_says_so() -> None:
    result = half(torch.ones(3, requires_grad=True))
    with pytest.raises(NotImplementedError, match="fastjepa_test::half has no gradient"):
        result.sum().backward()


def test_using_ops_does_not_import_the_compiler() -> None:
    """It takes a second of the start of every process."""
    use = (
        "import sys, torch, fastjepa_kernels as fk\n"
        "fk.patchify_gather(torch.rand(1, 3, 8, 8), None, 4)\n"
        "x = torch.rand(2, 4, 8, requires_grad=True)\n"
        "fk.gather_tokens(x, torch.tensor([[0, 1], [2, 3]])).sum().backward()\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", use], check=True, timeout=120)

"""What the gradients of several ops share."""

from typing import NoReturn

from torch import Tensor
from torch.autograd import forward_ad

from fastjepa_kernels.ops import Op


def refuse_second_derivative(op: str) -> NoReturn:
    raise NotImplementedError(
        f"{op} has no second derivative. Take its gradient without create_graph=True, or choose plain "
        "torch operations for this part of the model."
    )


def refuse_double_backward(backward: Op, op: str) -> None:
    """Have a second derivative of `op` refused in words; `backward` is the op that computes its first."""
    backward.register_autograd(lambda _ctx, *_gradients: refuse_second_derivative(op))


def refuse_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """An op of torch.library has no rule for tangents, and would drop them without a word."""
    if forward_ad._current_level < 0:
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            f"{op} cannot be differentiated in forward mode (jvp, jacfwd, make_dual). Use reverse mode "
            "(grad, vjp, jacrev), or plain torch operations for this part of the model."
        )

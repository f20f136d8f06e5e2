"""What the gradients of several ops share."""

from typing import Any, NoReturn

from torch.library import CustomOpDef


def refuse_double_backward(backward: CustomOpDef, op: str) -> None:
    """Have a second derivative of `op` refused in words; `backward` is the op that computes its first."""

    def refuse(_ctx: Any, *_gradients: Any) -> NoReturn:
        raise NotImplementedError(
            f"{op} has no second derivative. Take its gradient without create_graph=True, or choose plain "
            "torch operations for this part of the model."
        )

    backward.register_autograd(refuse)

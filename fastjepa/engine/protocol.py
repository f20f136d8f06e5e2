"""What a training step needs of an engine, said here so that a type of it loads no DeepSpeed."""

from typing import Any, Protocol

from torch import Tensor, nn

from fastjepa.engine.single import SingleDevice


class ZeroEngine(Protocol):
    """What a step needs of DeepSpeed's."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def optimizer(self) -> Any:
        """With `param_groups`, where the rates are set."""

    def __call__(self, *inputs: Any) -> Any:
        """The forward pass."""

    def backward(self, loss: Tensor, /) -> Any:
        """Add the gradients of one micro-batch."""

    def step(self) -> Any:
        """Update the weights, after the last micro-batch."""

    def get_global_grad_norm(self) -> Any:
        """Of all gradients, before clipping."""

    def zero_optimization_stage(self) -> int:
        """0 to 3."""

    def was_step_applied(self) -> bool:
        """False if the last step was skipped, for gradients that are not finite."""


Engine = SingleDevice | ZeroEngine

"""Which launches an op makes: its host function runs on meta tensors, and every launch is written down."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from triton.runtime.jit import JITFunction

from fastjepa_kernels.language import assumed_architecture

MAX_GRID = (2**31 - 1, 65535, 65535)  # of CUDA; HIP allows more


@dataclass(frozen=True)
class Launch:
    """`kernel[grid](*arguments, **keywords)`."""

    kernel: Any  # JITFunction
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


def launches(host: Callable[..., Any], arguments: tuple[Any, ...], architecture: int) -> list[Launch]:
    """What `host(*arguments)` would launch on a GPU of this architecture, in order.

    Args:
        host: launches kernels, and reads no tensor's values.
        arguments: its tensors on the device "meta".
        architecture: as `fastjepa_kernels.language.architecture` says it.

    Raises:
        ValueError: a grid that no GPU takes, or nothing was launched.
    """
    found: list[Launch] = []

    def record(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        if callable(grid):
            bound = self.signature.bind_partial(
                *arguments, **{k: keywords[k] for k in keywords if k in self.arg_names}
            )
            grid = grid(bound.arguments)
        found.append(Launch(self, tuple(grid), arguments, keywords))

    with patch.object(JITFunction, "run", record), assumed_architecture(architecture):
        host(*arguments)
    if not found:
        raise ValueError("nothing was launched")
    for launch in found:
        if not all(0 < size <= most for size, most in zip(launch.grid, MAX_GRID, strict=False)):
            raise ValueError(
                f"{launch.kernel.__name__} is launched over {launch.grid}, allowed is {MAX_GRID}"
            )
    return found

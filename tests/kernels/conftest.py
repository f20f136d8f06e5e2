"""What tests of the kernels share."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class PackedCalls(TorchDispatchMode, list[tuple[int, ...]]):
    """The shape of qkv of every call of the op packed_attention within a block."""

    def __torch_dispatch__(
        self,
        function: Any,
        _types: Any,
        arguments: tuple[Any, ...] = (),
        keywords: dict[str, Any] | None = None,
    ) -> Any:
        if function is torch.ops.fastjepa.packed_attention.default:
            self.append(tuple(arguments[0].shape))
        return function(*arguments, **(keywords or {}))


@pytest.fixture
def packed_calls() -> Callable[[], PackedCalls]:
    return PackedCalls

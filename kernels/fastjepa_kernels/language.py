"""Triton, or what stands in its place where there is none, so that every op can be imported."""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for the CPU comes without it

    class _Missing:
        """Lets the kernels be defined, never run: `choice` does not offer them."""

        constexpr = None

        def jit(self, function: Any = None, **_options: Any) -> Any:
            return function if function is not None else lambda f: f

    triton = tl = _Missing()

HAS_TRITON = hasattr(triton, "__version__")
# Triton reads it when a kernel is defined, so a later change would do nothing.
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"


_assumed: int | None = None


@contextmanager
def assumed_architecture(number: int) -> Iterator[None]:
    """Choose launch configurations for this architecture, whatever the device: to compile without it."""
    global _assumed
    before, _assumed = _assumed, number
    try:
        yield
    finally:
        _assumed = before


def architecture(device: torch.device) -> int:
    """What launch configurations are chosen by: 80, 90, 100 on NVIDIA's, 942 for gfx942.

    0 for a device without one: the interpreter's.
    """
    return _architecture(device) if _assumed is None else _assumed


@functools.cache
def _architecture(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName  # "gfx942:sramecc+:xnack-"
        return int("".join(c for c in name.split(":")[0] if c.isdigit()) or 0)
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor

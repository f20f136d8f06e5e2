"""How the memory-bound kernels cut their work: pure functions of shapes."""

from torch import Tensor


def columns_per_program(width: int) -> int:
    """How many of a row's `width` elements one program handles: a power of two.

    A divisor of the width where one is large enough, so that no lane idles; 256 elements of bf16 are a
    warp's width of 16-byte loads.
    """
    divisor = width & -width
    return min(divisor, 256) if divisor >= 64 else min(1 << (width - 1).bit_length(), 128)


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor itself where elements of a row lie side by side, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()

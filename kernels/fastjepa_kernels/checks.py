"""What every op checks before it reads or writes a byte: errors that name the argument."""

import itertools
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_DEBUG = os.environ.get("FASTJEPA_DEBUG", "0") == "1"
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def require(condition: bool, message: str | Callable[[], str]) -> None:
    """Raise ValueError unless `condition`; a message that takes work to put together comes as a function."""
    if not condition:
        raise ValueError(message if isinstance(message, str) else message())


def shape_of(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def require_float(name: str, tensor: Tensor) -> None:
    require(tensor.dtype in FLOAT_DTYPES, lambda: f"{name} must be floating point, got {shape_of(tensor)}")


def require_same_device(**tensors: Tensor | None) -> None:
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    devices = {tensor.device for tensor in present.values()}
    require(
        len(devices) <= 1,
        lambda: (
            "all tensors must be on one device, got "
            + ", ".join(f"{name} on {tensor.device}" for name, tensor in present.items())
        ),
    )


def values_are_checked(tensor: Tensor) -> bool:
    """On the CPU always; on a GPU, where looking waits for the device, only under FASTJEPA_DEBUG=1."""
    return tensor.device.type == "cpu" or (tensor.device.type == "cuda" and _DEBUG)


def require_index(name: str, index: Tensor) -> None:
    require(
        index.dtype in INDEX_DTYPES,
        lambda: f"{name} must hold integers (int8 to int64, uint8), got {shape_of(index)}",
    )


def require_index_values(name: str, index: Tensor, bound: int) -> None:
    """Each in 0..bound-1. For the inside of an op."""
    if values_are_checked(index) and index.numel() > 0:
        low, high = (int(end) for end in index.aminmax())
        require(low >= 0 and high < bound, lambda: f"{name} must lie in 0..{bound - 1}, got {low}..{high}")


def require_cu_seqlens(cu_seqlens: Tensor) -> None:
    require(
        cu_seqlens.dtype == torch.int32 and cu_seqlens.ndim == 1 and cu_seqlens.numel() >= 1,
        lambda: f"cu_seqlens must be int32 [sequences + 1], got {shape_of(cu_seqlens)}",
    )


def require_cu_seqlens_values(cu_seqlens: Tensor, tokens: int, max_seqlen: int | None = None) -> None:
    """Starting at 0, never decreasing, ending at most at `tokens`. For the inside of an op."""
    if not values_are_checked(cu_seqlens):
        return
    ends = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(ends)]
    require(ends[0] == 0, lambda: f"cu_seqlens must start at 0, got {ends[0]}")
    require(
        min(lengths, default=0) >= 0,
        lambda: f"cu_seqlens must never decrease, got steps of {lengths[:8]}",
    )
    require(ends[-1] <= tokens, lambda: f"cu_seqlens ends at {ends[-1]}, but there are only {tokens} tokens")
    longest = max(lengths, default=0)
    require(
        max_seqlen is None or longest <= max_seqlen,
        lambda: f"max_seqlen must be an upper bound: it is {max_seqlen}, a sequence has {longest} tokens",
    )


def require_writable(written: Sequence[Tensor], name: Callable[[int], str]) -> None:
    """No inference tensors outside of inference mode: torch objects only after the write."""
    if not torch.is_inference_mode_enabled() and True in map(Tensor.is_inference, written):
        place = [tensor.is_inference() for tensor in written].index(True)
        raise ValueError(
            f"{name(place)} was made in torch.inference_mode() and can be written to only there; "
            "call this in that mode too, or clone it first"
        )

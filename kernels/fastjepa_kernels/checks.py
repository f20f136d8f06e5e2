"""What every op checks before it reads or writes a byte: errors that name the argument."""

import torch
from torch import Tensor

INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def shape_of(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def require_float(name: str, tensor: Tensor) -> None:
    require(tensor.dtype in FLOAT_DTYPES, f"{name} must be floating point, got {shape_of(tensor)}")


def require_same_device(**tensors: Tensor | None) -> None:
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    devices = {tensor.device for tensor in present.values()}
    listing = ", ".join(f"{name} on {tensor.device}" for name, tensor in present.items())
    require(len(devices) <= 1, f"all tensors must be on one device, got {listing}")


def require_index(name: str, index: Tensor, bound: int) -> None:
    """Integer dtype always; the range on the CPU only, where looking costs no synchronisation."""
    require(index.dtype in INDEX_DTYPES, f"{name} must hold integers, got {shape_of(index)}")
    if index.device.type == "cpu" and index.numel() > 0:
        low, high = int(index.min()), int(index.max())
        require(low >= 0 and high < bound, f"{name} must lie in 0..{bound - 1}, got {low}..{high}")


def require_cu_seqlens(cu_seqlens: Tensor, tokens: int, max_seqlen: int | None = None) -> None:
    """int32 [S + 1], starting at 0, never decreasing, ending at most at `tokens`."""
    require(
        cu_seqlens.dtype == torch.int32 and cu_seqlens.ndim == 1 and cu_seqlens.numel() >= 1,
        f"cu_seqlens must be int32 [sequences + 1], got {shape_of(cu_seqlens)}",
    )
    if cu_seqlens.device.type != "cpu":
        return
    lengths = cu_seqlens.diff()
    require(int(cu_seqlens[0]) == 0, f"cu_seqlens must start at 0, got {int(cu_seqlens[0])}")
    require(bool((lengths >= 0).all()), "cu_seqlens must never decrease")
    last = int(cu_seqlens[-1])
    require(last <= tokens, f"cu_seqlens ends at {last}, but there are only {tokens} tokens")
    if max_seqlen is not None and lengths.numel() > 0:
        longest = int(lengths.max())
        require(
            longest <= max_seqlen,
            f"max_seqlen must be an upper bound: it is {max_seqlen}, a sequence has {longest} tokens",
        )

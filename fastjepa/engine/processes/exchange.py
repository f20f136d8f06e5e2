"""Plain values between ranks. torch's collectives of objects unpickle what comes, which can run any code.

A value is what JSON has: None, bools, numbers, strings, lists and dicts of them. Tuples come as lists.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_plain(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value, by rank, on every rank (every rank must call this).

    Args:
        value: of this rank.
        group: None is that of all ranks.

    Raises:
        TypeError: it is not plain.
        ValueError: another rank sent what is no JSON.
    """
    said = _written(value, group)
    lengths = _lengths(said.numel(), group)
    heard = [said.new_empty(max(lengths)) for _ in lengths]
    dist.all_gather(heard, _padded(said, max(lengths)), group=group)
    return [_read(one, n) for one, n in zip(heard, lengths, strict=True)]


def gather_on_first(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """As `gather_plain`, to the group's rank 0 alone; the others get an empty list."""
    said = _written(value, group)
    lengths = _lengths(said.numel(), group)
    is_first = dist.get_rank(group) == 0
    heard = [said.new_empty(max(lengths)) for _ in lengths] if is_first else []
    dist.gather(_padded(said, max(lengths)), heard if is_first else None, group=group, group_dst=0)
    return [_read(one, n) for one, n in zip(heard, lengths, strict=is_first)]


def scatter_plain(values: Sequence[Any], group: dist.ProcessGroup | None = None) -> Any:
    """To each rank its own of the values that the group's rank 0 gives; the others' are not looked at."""
    is_first = dist.get_rank(group) == 0
    written = [_written(value, group) for value in values] if is_first else []
    lengths = gather_plain([one.numel() for one in written], group)[0]
    heard = torch.empty(max(lengths), dtype=torch.uint8, device=_device(group))
    padded = [_padded(one, max(lengths)) for one in written]
    dist.scatter(heard, padded if is_first else None, group=group, group_src=0)
    return _read(heard, lengths[dist.get_rank(group)])


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Where the group's collectives take tensors from."""
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


def _written(value: Any, group: dist.ProcessGroup | None) -> Tensor:
    """uint8 [n]"""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(_device(group))


def _read(heard: Tensor, length: int) -> Any:
    # As bytes by way of numpy: a list of a tensor's elements would take 30 times the memory.
    return json.loads(heard[:length].cpu().numpy().tobytes())


def _lengths(own: int, group: dist.ProcessGroup | None) -> list[int]:
    mine = torch.tensor([own], device=_device(group))
    lengths = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(lengths, mine, group=group)
    return [int(length) for length in lengths]


def _padded(said: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(said, (0, length - said.numel()))

"""Plain values between ranks. torch's collectives of objects unpickle what comes, which can run any code."""

import json
from typing import Any

import torch
import torch.distributed as dist


def gather_plain(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value, by rank, on every rank (every rank must call this).

    Args:
        value: what JSON has: None, bools, numbers, strings, lists and dicts of them. Tuples come as lists.
        group: None is that of all ranks.

    Raises:
        TypeError: it is something else.
        ValueError: another rank sent what is no JSON.
    """
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    said = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)  # [n]
    size = dist.get_world_size(group)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([said.numel()], device=device), group=group)
    counts = [int(length.item()) for length in lengths]
    padded = torch.zeros(max(counts), dtype=torch.uint8, device=device)
    padded[: said.numel()] = said
    heard = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(heard, padded, group=group)
    # As bytes by way of numpy: a list of a tensor's elements would take 30 times the memory.
    return [json.loads(one[:n].cpu().numpy().tobytes()) for one, n in zip(heard, counts, strict=True)]

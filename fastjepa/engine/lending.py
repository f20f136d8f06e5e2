"""Weights under ZeRO 3: every rank keeps its part of each, and has a block's together while it runs.

    before block i    wait for its all-gather, send off that of block i + 1, lay out each parameter
    after block i     its parameters are empty again

Two blocks' worth of buffers serve a network of any depth, so it is never whole on any rank.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

# torch 2.14 renames it and warns of the old name; 2.11 knows the old one alone.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Share(NamedTuple):
    """One parameter of a unit, and this rank's part of it.

    Attributes:
        parameter: of the network, empty between uses.
        shape: of it when whole.
        mine: [count], the elements that this rank keeps; none where a small parameter ends before.
        numel: of each rank's part, padding included.
    """

    parameter: nn.Parameter
    shape: torch.Size
    mine: Tensor
    numel: int


@dataclass
class _Buffers:
    """What one unit needs to be put together: parts of this rank, of all ranks, and whole parameters."""

    send: Tensor  # [S]
    received: Tensor  # [world, S]
    whole: Tensor  # [world * S], parameter after parameter

    @classmethod
    def of(cls, numel: int, like: Tensor) -> "_Buffers":
        world = dist.get_world_size()
        return cls(like.new_zeros(numel), like.new_empty(world, numel), like.new_empty(world * numel))


class Lender:
    """Puts the parameters of a network cut as by ZeRO 3 together, unit by unit.

    Args:
        shares: each unit's parameters. All ranks go through the units alike.
    """

    def __init__(self, shares: Sequence[Sequence[Share]]) -> None:
        self.units = [list(unit) for unit in shares]
        most = max(sum(share.numel for share in unit) for unit in self.units)
        like = self.units[0][0].mine
        self._buffers = [_Buffers.of(most, like) for _ in range(min(2, len(self.units)))]
        self._coming: tuple[int, Any] | None = None  # a unit that was sent for, and what to wait for
        for unit in self.units:
            self._take_back(unit)

    @contextmanager
    def lend(self, number: int) -> Iterator[None]:
        """Within it the parameters of a unit are whole; the next unit is on its way."""
        self.put_together(number)
        if number + 1 < len(self.units):
            self._send_for(number + 1)
        try:
            yield
        finally:
            self._take_back(self.units[number])

    def put_together(self, number: int) -> None:
        """Have the parameters of a unit whole, until a unit two after it is."""
        if self._coming is None or self._coming[0] != number:
            self._send_for(number)
        assert self._coming is not None
        self._coming[1].wait()
        self._coming = None
        buffers, at = self._buffers[number % 2], 0
        ranks = len(buffers.received)
        for share in self.units[number]:
            whole = buffers.whole[at * ranks : (at + share.numel) * ranks]
            whole.view(ranks, share.numel).copy_(buffers.received[:, at : at + share.numel])
            share.parameter.data = whole[: share.shape.numel()].view(share.shape)
            at += share.numel

    def _send_for(self, number: int) -> None:
        if self._coming is not None:  # of a pass that was left half-way
            self._coming[1].wait()
        buffers, at = self._buffers[number % 2], 0
        for share in self.units[number]:
            buffers.send[at : at + len(share.mine)].copy_(share.mine)
            at += share.numel
        self._coming = number, all_gather(buffers.received.view(-1), buffers.send, async_op=True)

    def _take_back(self, unit: Sequence[Share]) -> None:
        for share in unit:
            share.parameter.data = share.mine.new_empty(0)

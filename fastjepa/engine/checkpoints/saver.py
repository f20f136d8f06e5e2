"""Saving in the background: training waits for a copy in the memory of its own host, and for nothing else.

    every rank, in the step      its parts (masters, moments, shadow) -> buffers of the host
    every rank, in a thread      windows of the files -> rank 0, over a gloo group of its own
    rank 0, in its thread        -> safetensors files, hashed, synced, renamed             `write`

The buffers stay between saves: a host needs what its ranks keep in fp32 once more, and rank 0 up to eight
windows of 16 MiB besides. No rank ever has a whole model.
"""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastjepa.engine.checkpoints.keep import Keep, prune
from fastjepa.engine.checkpoints.plan import FilePlan, Window, in_turn, plan_file
from fastjepa.engine.checkpoints.write import writing
from fastjepa.engine.partitions import Parts, Slice, plain_slices, slices_of
from fastjepa.engine.processes.exchange import gather_plain
from fastjepa.engine.processes.world import HOST_TIMEOUT, World

AHEAD = 8  # windows that rank 0 has received and not yet written


class Sink(Protocol):
    """Where rank 0 puts the files together."""

    def write(self, file: str, tensors: Sequence[Tensor]) -> Future[None]:
        """Take the next elements of a file; they may change once the result is there."""


@dataclass
class HostCopy:
    """What this rank sends of a learner's state, in memory of the host.

    Attributes:
        plans: of the files, alike on every rank.
        parts: fp32 [n], by file, for each partition; empty where another rank sends it.
    """

    plans: dict[str, FilePlan]
    parts: dict[str, list[Tensor]]

    @torch.no_grad()
    def take(self, state: Mapping[str, Parts]) -> None:
        """Copy the state as it is now. On a GPU beside its other work, which the next step may then go on."""
        pairs = [
            (here, there)
            for file, parts in state.items()
            for here, there in zip(self.parts[file], parts.tensors, strict=True)
            if here.numel()
        ]
        device = next((there.device for _, there in pairs if there.is_cuda), None)
        if device is None:
            for here, there in pairs:
                here.copy_(there)
            return
        beside = torch.cuda.Stream(device)
        beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(beside):
            for here, there in pairs:
                here.copy_(there, non_blocking=True)
        beside.synchronize()


def host_copy(state: Mapping[str, Parts], group: dist.ProcessGroup | None) -> HostCopy:
    """Make the buffers, and agree with the other ranks on who sends what (every rank must call this).

    Args:
        state: by file. What every rank has whole is sent by rank 0.
        group: of the hosts; None for a process that is alone.
    """
    rank = 0 if group is None else dist.get_rank(group)
    mine: dict[str, list[Sequence[Slice]]] = {
        file: [() if p.is_whole and rank else p.slices for p in parts.partitions]
        for file, parts in state.items()
    }
    every = [mine]
    if group is not None:
        plain = {file: [plain_slices(slices) for slices in parts] for file, parts in mine.items()}
        every = [
            {file: [slices_of(slices) for slices in parts] for file, parts in one.items()}
            for one in gather_plain(plain, group)
        ]
    plans = {file: plan_file([slices[file] for slices in every]) for file in state}
    buffers = {
        file: [
            torch.empty(tensor.numel() if slices else 0, pin_memory=tensor.is_cuda)
            for tensor, slices in zip(parts.tensors, mine[file], strict=True)
        ]
        for file, parts in state.items()
    }
    return HostCopy(plans, buffers)


def send(copy: HostCopy, group: dist.ProcessGroup) -> None:
    """On the other ranks: what rank 0 needs of each window, as one message."""
    rank = dist.get_rank(group)
    for file, window in in_turn(copy.plans):
        cut = _cut(copy, file, window, rank)
        if cut:
            # By numpy: torch would start threads of its own beside those that train.
            message = np.concatenate([piece.numpy() for piece in cut])
            dist.send(torch.from_numpy(message), group=group, group_dst=0)


def receive(copy: HostCopy, group: dist.ProcessGroup | None, sink: Sink) -> None:
    """On rank 0: put every window together and hand it on.

    Raises:
        Exception: of the sink. The other ranks have been heard to their end all the same.
    """
    failure: Exception | None = None
    pending: list[Future[None] | None] = [None] * AHEAD
    for i, (file, window) in enumerate(in_turn(copy.plans)):
        received = {
            rank: _received(rank, sum(piece.numel for piece in window if piece.rank == rank), group)
            for rank in sorted({piece.rank for piece in window} - {0})
        }
        if failure is not None:
            continue
        mine = iter(_cut(copy, file, window, 0))
        pieces = [next(mine) if p.rank == 0 else _next_of(received, p.rank, p.numel) for p in window]
        try:
            before, pending[i % AHEAD] = pending[i % AHEAD], sink.write(file, pieces)
            if before is not None:
                before.result()
        except Exception as error:  # raised below: who sends must not wait for ever
            failure = error
    for written in pending:
        if written is not None and failure is None:
            written.result()
    if failure is not None:
        raise failure


def _cut(copy: HostCopy, file: str, window: Window, rank: int) -> list[Tensor]:
    """A rank's pieces of a window, in their order."""
    return [copy.parts[file][p.part][p.at : p.at + p.numel] for p in window if p.rank == rank]


def _received(rank: int, numel: int, group: dist.ProcessGroup | None) -> Tensor:
    message = torch.empty(numel)
    dist.recv(message, group=group, group_src=rank)
    return message


def _next_of(received: dict[int, Tensor], rank: int, count: int) -> Tensor:
    piece, received[rank] = received[rank][:count], received[rank][count:]
    return piece


@dataclass(frozen=True)
class Job:
    """A checkpoint to be written.

    Attributes:
        directory: of all checkpoints.
        step: of this one.
        state: what its state.json will say.
        keep: which stay once it is there.
    """

    directory: Path
    step: int
    state: Mapping[str, Any]
    keep: Keep


class Saver:
    """The one save that may be under way. Its methods are called on every rank.

    Args:
        state: by file, as it will be at every save.
        group: of the hosts, and of no one else: a thread uses it. None for a process that is alone.
    """

    def __init__(self, state: Mapping[str, Parts], group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._copy = host_copy(state, group)
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a save is under way on this rank."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> Exception | None:
        """Wait for the last save; what it failed of, told once, on any rank that knows."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        return failure

    def start(self, state: Mapping[str, Parts], job: Job) -> None:
        """Copy the state, which may change when this returns, and have the rest done in the background."""
        assert self._thread is None, "wait for the save before"
        self._copy.take(state)
        self._thread = threading.Thread(target=self._save, args=[job], name="saver", daemon=True)
        self._thread.start()

    def _save(self, job: Job) -> None:
        try:
            if self._group is not None and dist.get_rank(self._group):
                send(self._copy, self._group)
                return
            shapes = {file: plan.shapes for file, plan in self._copy.plans.items()}
            with writing(job.directory, job.step, shapes) as writer:
                receive(self._copy, self._group, writer)
                writer.finish(job.state)
            prune(job.directory, job.step, job.keep)
        except Exception as error:  # whatever it is, it costs this checkpoint and not the run
            self._failure = error


def start_saver(state: Mapping[str, Parts], world: World) -> Saver:
    """Make the buffers and the group (every rank must call this)."""
    if world.size == 1:
        return Saver(state, None)
    # Of its own: messages of a thread must not meet those of the training loop.
    group = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
    return Saver(state, cast(dist.ProcessGroup, group))

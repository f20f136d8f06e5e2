"""Saving in the background: training waits for a copy in the memory of its own host, and for nothing else.

    every rank, in the step      its parts (masters, moments, shadow) -> buffers of the host
    every rank, in a thread      what it has of a batch of windows -> rank 0, over a gloo group of its own
    rank 0, in its thread        -> safetensors files, hashed, synced, renamed             `write`
    every rank, in its thread    hears from rank 0 what became of it

The buffers are there from the start: a host needs what its ranks keep in fp32 once more. Rank 0 has up to two
batches of at most eight windows of 16 MiB in hand, and one window of each file while it joins small pieces:
320 MiB. No rank ever has a whole model.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.distributed as dist

from fastjepa.engine.checkpoints.checkpoint import CheckpointError
from fastjepa.engine.checkpoints.host import HostCopy, host_copy
from fastjepa.engine.checkpoints.keep import Keep, prune
from fastjepa.engine.checkpoints.plan import AT_MOST, Batch
from fastjepa.engine.checkpoints.write import Array, writing
from fastjepa.engine.partitions import Parts
from fastjepa.engine.processes.world import HOST_TIMEOUT, World

AHEAD = AT_MOST  # windows that rank 0 has handed on and that are not yet written


class Sink(Protocol):
    """Where rank 0 puts the files together."""

    def write(self, file: str, arrays: Sequence[Array]) -> Future[None]:
        """Take the next elements of a file; they may change once the result is there."""


def send(copy: HostCopy, group: dist.ProcessGroup) -> None:
    """On the other ranks: what rank 0 needs of each batch, as one message."""
    own = _arrays(copy)
    for message in copy.messages:
        # By numpy: torch would start threads of its own beside those that train.
        cut = np.concatenate([own[file][p.part][p.at : p.at + p.numel] for file, p in message])
        dist.send(torch.from_numpy(cut), group=group, group_dst=0)


def receive(copy: HostCopy, group: dist.ProcessGroup | None, sink: Sink) -> None:
    """On rank 0: put every window together and hand it on.

    Raises:
        Exception: of the sink. The other ranks have been heard to their end all the same.
    """
    own = _arrays(copy)
    failure: Exception | None = None
    pending: list[Future[None]] = []
    for batch in copy.batches:
        messages = _received(batch, group)
        if failure is not None:
            continue
        try:
            for file, arrays in put_together(batch, messages, own):
                pending.append(sink.write(file, arrays))
                if len(pending) > AHEAD:
                    pending.pop(0).result()
        except Exception as error:  # raised below: who sends must not wait for ever
            failure = error
    if failure is not None:
        raise failure
    for written in pending:
        written.result()


def put_together(
    batch: Batch, messages: Mapping[int, Array], own: Mapping[str, Sequence[Array]]
) -> Iterator[tuple[str, list[Array]]]:
    """Each window of a batch with its file, as pieces in their order, which are views.

    Args:
        batch: from `batches_of`.
        messages: fp32 [n] from each other rank, its pieces one after another.
        own: fp32 [n], the parts of this rank, by file.
    """
    at = dict.fromkeys(messages, 0)
    for file, window in batch.windows:
        pieces = []
        for rank, part, begin, numel in window:
            if rank == 0:
                pieces.append(own[file][part][begin : begin + numel])
            else:
                pieces.append(messages[rank][at[rank] : at[rank] + numel])
                at[rank] += numel
        yield file, pieces


def _received(batch: Batch, group: dist.ProcessGroup | None) -> dict[int, Array]:
    """What all other ranks send of a batch, in whatever order it comes."""
    messages = {rank: np.empty(n, np.float32) for rank, n in sorted(batch.numel.items()) if rank}
    under_way = [dist.irecv(torch.from_numpy(m), group=group, group_src=r) for r, m in messages.items()]
    for work in under_way:
        assert work is not None
        work.wait()
    return messages


def _arrays(copy: HostCopy) -> dict[str, list[Array]]:
    return {file: [part.numpy() for part in parts] for file, parts in copy.parts.items()}


@dataclass(frozen=True)
class Job:
    """A checkpoint to be written.

    Attributes:
        directory: of all checkpoints.
        step: of this one.
        state: what its state.json will say.
        keep: which stay once it is there.
        damaged: checkpoints that are known to be.
    """

    directory: Path
    step: int
    state: Mapping[str, Any]
    keep: Keep
    damaged: frozenset[Path] = frozenset()


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
        """Wait for the last save; what it failed of, told once: on every rank, if it did on rank 0."""
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
            else:
                self._write(job)
        except Exception as error:  # whatever it is, it costs this checkpoint and not the run
            self._failure = error
        if self._group is not None:
            self._hear_from_main(self._group)

    def _write(self, job: Job) -> None:
        shapes = {file: plan.shapes for file, plan in self._copy.plans.items()}
        with writing(job.directory, job.step, shapes) as writer:
            receive(self._copy, self._group, writer)
            writer.finish(job.state)
        prune(job.directory, job.step, job.keep, job.damaged)

    def _hear_from_main(self, group: dist.ProcessGroup) -> None:
        """Only rank 0 knows whether there is a checkpoint now."""
        failed = torch.tensor([int(self._failure is not None)])
        try:
            dist.broadcast(failed, group=group, group_src=0)
        except Exception as error:  # rank 0 is lost
            self._failure = self._failure or error
        if self._failure is None and failed.item():
            self._failure = CheckpointError("rank 0 could not write it")


def start_saver(state: Mapping[str, Parts], world: World) -> Saver:
    """Make the buffers and the group (every rank must call this)."""
    if world.size == 1:
        return Saver(state, None)
    # Of its own: messages of a thread must not meet those of the training loop.
    group = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
    return Saver(state, cast(dist.ProcessGroup, group))

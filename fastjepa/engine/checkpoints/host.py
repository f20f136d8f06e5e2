"""A rank's part of the state, copied into memory of its host, and what of it goes to rank 0 in which message.

The buffers are made once, before training, and their pages with them: a host that is too small says so at
the start of a run and not at its first save.
"""

import gc
import mmap
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fastjepa.engine.checkpoints.checkpoint import CheckpointError
from fastjepa.engine.checkpoints.plan import Batch, FilePlan, Piece, batches_of, plan_file
from fastjepa.engine.partitions import Parts, Slice, plain_slices, slices_of
from fastjepa.engine.processes.exchange import gather_on_first, scatter_plain

Message = list[tuple[str, Piece]]
Cut = dict[str, list[Sequence[Slice]]]  # by file, for each part


@dataclass
class HostCopy:
    """What this rank has of a learner's state, in memory of the host.

    Attributes:
        plans: of the files, on rank 0; empty elsewhere.
        batches: what rank 0 receives, in this order; empty elsewhere.
        messages: what this rank sends to rank 0, in this order; empty there.
        parts: fp32 [n], by file, for each partition; empty where another rank sends it.
    """

    plans: dict[str, FilePlan]
    batches: list[Batch]
    messages: list[Message]
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

    Raises:
        CheckpointError: the host has not the memory.
    """
    rank = 0 if group is None else dist.get_rank(group)
    mine: Cut = {
        file: [() if p.is_whole and rank else p.slices for p in parts.partitions]
        for file, parts in state.items()
    }
    parts = _buffers(state, mine)
    if group is None:
        plans, batches = _plan([mine])
        return HostCopy(plans, batches, [], parts)
    ranks = dist.get_world_size(group)
    plain = {file: [plain_slices(slices) for slices in parts] for file, parts in mine.items()}
    every: list[Cut] = [
        {file: [slices_of(slices) for slices in parts] for file, parts in one.items()}
        for one in gather_on_first(plain, group)
    ]
    plans, batches = _plan(every) if rank == 0 else ({}, [])
    messages = [[batch.sent[r] for batch in batches if r in batch.sent] for r in range(ranks)]
    told = scatter_plain(messages, group)
    messages_here = [[(file, Piece(*piece)) for file, piece in message] for message in told]
    for batch in batches:
        batch.sent.clear()  # rank 0 needs the windows and the sizes
    return HostCopy(plans, batches, [] if rank == 0 else messages_here, parts)


def _plan(every: Sequence[Cut]) -> tuple[dict[str, FilePlan], list[Batch]]:
    """All that is made stays, for many ranks a million tuples: looking for garbage would take most of it."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        plans = plan_files(every)
        return plans, list(batches_of(plans))
    finally:
        if was_on:
            gc.enable()


def plan_files(every: Sequence[Cut]) -> dict[str, FilePlan]:
    """Lay out all files; those that are cut alike, as weights and moments are, once."""
    plans: dict[str, FilePlan] = {}
    for file in every[0]:
        alike = (f for f in plans if all(cut[f] == cut[file] for cut in every))
        same = next(alike, None)
        plans[file] = plan_file([cut[file] for cut in every]) if same is None else plans[same]
    return plans


def _buffers(state: Mapping[str, Parts], mine: Cut) -> dict[str, list[Tensor]]:
    sizes = {
        file: [t.numel() if slices else 0 for t, slices in zip(parts.tensors, mine[file], strict=True)]
        for file, parts in state.items()
    }
    try:
        return {
            file: [buffer(n, tensor.device) for n, tensor in zip(sizes[file], parts.tensors, strict=True)]
            for file, parts in state.items()
        }
    except (OSError, RuntimeError, MemoryError) as error:
        gib = 4 * sum(map(sum, sizes.values())) / 2**30
        raise CheckpointError(
            f"this host has no {gib:.1f} GiB of memory free for each rank's copy of its state, from which "
            "checkpoints are written: use more hosts, or fewer ranks on each"
        ) from error


def buffer(numel: int, device: torch.device) -> Tensor:
    """fp32 [n] on the host, its pages there at once; if `device` is a GPU, of a kind it copies to unaided.

    Torch's own pinned memory comes in powers of two, so that it may take twice what is asked for. These are
    whole pages, which no child process gets a copy of when either writes to them.
    """
    if device.type != "cuda" or numel == 0:
        return torch.empty(numel).zero_()
    flat = torch.frombuffer(mmap.mmap(-1, 4 * numel), dtype=torch.float32).zero_()
    cudart = torch.cuda.cudart()
    if int(cudart.cudaHostRegister(flat.data_ptr(), flat.nbytes, 0)) == 0:
        weakref.finalize(flat, cudart.cudaHostUnregister, flat.data_ptr()).atexit = False
    else:  # copies go by way of the driver's own memory then
        with suppress(RuntimeError):  # the next launch would be blamed for it
            torch.zeros(1, device=device)
    return flat

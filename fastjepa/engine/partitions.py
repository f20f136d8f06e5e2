"""Where an engine keeps the fp32 weights and the moments, and which parameter each element belongs to.

ZeRO flattens the parameters of an optimizer group into one buffer and gives each rank an equal, contiguous
part of its fp32 master. Everything of ours that must live beside the master (the shadow of the target
encoder) or must not depend on how it was cut (checkpoints) goes through `Partition`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fastjepa.engine.protocol import Engine, ZeroEngine
from fastjepa.engine.single import FlatGroup, SingleDevice

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """One parameter inside a flat group."""

    name: str
    shape: torch.Size
    offset: int  # of its first element in the group


@dataclass(frozen=True)
class Partition:
    """This rank's part of one flat group of parameters.

    Attributes:
        pieces: the parameters of the whole group.
        group_numel: elements of the whole group, ZeRO's padding included.
        start: where this rank's part begins in it.
        master: fp32 [n], this rank's part, flat.
        parameter: what the optimizer's state is keyed by; shares its memory with `master`.
    """

    pieces: tuple[Piece, ...]
    group_numel: int
    start: int
    master: Tensor
    parameter: Tensor

    @property
    def is_whole(self) -> bool:
        return self.master.numel() == self.group_numel

    def take(self, named: Mapping[str, Tensor], into: Tensor) -> None:
        """Copy this rank's part of the named fp32 tensors into `into` [n]; padding is left alone."""
        stop = self.start + into.numel()
        for piece in self.pieces:
            low = max(self.start, piece.offset)
            high = min(stop, piece.offset + piece.shape.numel())
            if low < high:
                part = named[piece.name].reshape(-1)[low - piece.offset : high - piece.offset]
                into[low - self.start : high - self.start].copy_(part)

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """The named tensors of a whole group, as views of `flat` [group_numel]."""
        return {
            piece.name: flat[piece.offset : piece.offset + piece.shape.numel()].view(piece.shape)
            for piece in self.pieces
        }


def partitions_of(engine: Engine) -> list[Partition]:
    """The partitions of an engine at ZeRO 0, 1 or 2, in the order of its optimizer groups."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in engine.module.named_parameters()}
    if isinstance(engine, SingleDevice):
        return [_of_group(group, names) for group in engine.groups]
    optimizer = engine.optimizer
    if hasattr(optimizer, "single_partition_of_fp32_groups"):  # ZeRO 1 and 2
        flats, groups = optimizer.bit16_groups_flat, optimizer.bit16_groups
        return _flat(flats, groups, optimizer.single_partition_of_fp32_groups, names)
    if hasattr(optimizer, "fp32_groups_flat_partition"):  # ZeRO 1 in bf16, gradients summed in fp32
        flats, groups = optimizer.bf16_groups_flat, optimizer.bf16_groups
        return _flat(flats, groups, optimizer.fp32_groups_flat_partition, names)
    if hasattr(optimizer, "fp32_groups"):  # stage 0 in bf16: an fp32 copy of every parameter
        pairs = zip(_chain(optimizer.fp16_groups), _chain(optimizer.fp32_groups), strict=True)
        return [_whole(names[parameter], master) for parameter, master in pairs]
    return [_whole(names[p], p) for group in optimizer.param_groups for p in group["params"]]


def _flat(
    flats: list[Tensor], groups: list[list[Tensor]], masters: list[Tensor], names: dict[Tensor, str]
) -> list[Partition]:
    partitions = []
    for flat, parameters, master in zip(flats, groups, masters, strict=True):
        # Offsets from addresses, not from sums of sizes: ZeRO pads for alignment.
        pieces = tuple(
            Piece(names[p], p.shape, (p.data_ptr() - flat.data_ptr()) // flat.element_size())
            for p in parameters
        )
        start = dist.get_rank() * master.numel()
        partitions.append(Partition(pieces, flat.numel(), start, master.data, master))
    return partitions


def _of_group(group: FlatGroup, names: dict[Tensor, str]) -> Partition:
    pieces = tuple(Piece(names[s.parameter], s.parameter.shape, s.offset) for s in group.slots)
    return Partition(pieces, group.master.numel(), 0, group.master, group.master)


def _whole(name: str, master: Tensor) -> Partition:
    return Partition((Piece(name, master.shape, 0),), master.numel(), 0, master.data.view(-1), master)


def _chain(groups: Iterable[Iterable[Tensor]]) -> Iterable[Tensor]:
    return (tensor for group in groups for tensor in group)


def gather(partitions: list[Partition], parts: list[Tensor]) -> dict[str, Tensor]:
    """Put the ranks' parts together, by name, on the CPU of rank 0; the other ranks get nothing.

    Args:
        partitions: as on every rank.
        parts: a flat tensor beside each partition's master.
    """
    named: dict[str, Tensor] = {}
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for partition, part in zip(partitions, parts, strict=True):
        if partition.is_whole:
            whole = part
        else:
            whole = part.new_empty(partition.group_numel) if rank == 0 else part
            slots = list(whole.split(part.numel())) if rank == 0 else None
            assert slots is None or len(slots) == world_size
            dist.gather(part, slots, dst=0)
        if rank == 0:
            named |= {name: tensor.cpu().clone() for name, tensor in partition.split(whole).items()}
    return named


def moments_of(engine: Engine, partitions: list[Partition], moment: str) -> list[Tensor]:
    """The flat optimizer moments beside each partition's master; zeros before the first update."""
    if isinstance(engine, SingleDevice):
        return [getattr(group, moment) for group in engine.groups]
    state = torch_optimizer(engine).state
    return [
        state[partition.parameter][moment].view(-1)
        if partition.parameter in state
        else torch.zeros_like(partition.master)
        for partition in partitions
    ]


def load_weights(engine: Engine, partitions: list[Partition], weights: Mapping[str, Tensor]) -> None:
    """Set the fp32 masters, and the weights the network computes with, from named fp32 tensors."""
    with torch.no_grad():
        for partition in partitions:
            partition.take(weights, into=partition.master)
        for name, parameter in engine.module.named_parameters():
            parameter.copy_(weights[name])


def load_moments(
    engine: Engine,
    partitions: list[Partition],
    moments: Mapping[str, Mapping[str, Tensor]],
    steps: int,
) -> None:
    """Set the optimizer's moments by name, and its count of steps. Without steps, forget all."""
    if isinstance(engine, SingleDevice):
        engine.set_updates(steps)
        for moment in MOMENTS:
            for partition, flat in zip(partitions, moments_of(engine, partitions, moment), strict=True):
                flat.zero_()
                if steps > 0:
                    partition.take(moments[moment], into=flat)
        return
    optimizer = torch_optimizer(engine)
    # DeepSpeed's wrappers may have taken a first step on zero gradients, to make the state.
    optimizer.state.clear()
    if steps == 0:
        return
    for partition in partitions:
        device = partition.master.device
        state = {"step": torch.tensor(float(steps), device=device if device.type == "cuda" else "cpu")}
        for moment in MOMENTS:
            flat = torch.zeros_like(partition.master)
            partition.take(moments[moment], into=flat)
            state[moment] = flat.view(partition.parameter.shape)
        optimizer.state[partition.parameter] = state


def torch_optimizer(engine: ZeroEngine) -> torch.optim.Optimizer:
    """The optimizer inside DeepSpeed's wrapper, if there is a wrapper."""
    optimizer: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return optimizer

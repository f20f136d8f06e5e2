"""Where an engine keeps the fp32 weights and the moments, and which parameter each element belongs to.

ZeRO flattens the parameters of an optimizer group into one buffer and gives each rank an equal, contiguous
part of its fp32 master; ZeRO 3 does that with every parameter. Everything of ours that must live beside the
master (the shadow of the target encoder) or must not depend on how it was cut (checkpoints) goes through
`Partition`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fastjepa.engine.lending import all_gather
from fastjepa.engine.processes.exchange import gather_plain
from fastjepa.engine.protocol import Engine, ZeroEngine
from fastjepa.engine.single import FlatGroup, SingleDevice

MOMENTS = ("exp_avg", "exp_avg_sq")
AT_ONCE = 2**24  # elements that `gather` has on a device at a time: 64 MiB


@dataclass(frozen=True)
class Slice:
    """Consecutive elements of one parameter, and where a rank has them.

    Attributes:
        name: of the parameter, in the student.
        shape: of the whole parameter.
        first: the parameter's element that it begins with.
        at: where that is in the rank's flat part.
        count: elements.
    """

    name: str
    shape: torch.Size
    first: int
    at: int
    count: int


def plain_slices(slices: Iterable[Slice]) -> list[list[Any]]:
    """As JSON has them, for the other ranks."""
    return [[s.name, list(s.shape), s.first, s.at, s.count] for s in slices]


def slices_of(plain: Iterable[list[Any]]) -> tuple[Slice, ...]:
    """What `plain_slices` has written."""
    return tuple(Slice(name, torch.Size(shape), *numbers) for name, shape, *numbers in plain)


@dataclass(frozen=True)
class FlatLayout:
    """How the ranks' equal parts make up one buffer of whole parameters (ZeRO 0 to 2).

    Attributes:
        whole: each parameter in the buffer; `first` is 0, `at` counts from the buffer's start.
        numel: elements of the buffer, ZeRO's padding included.
        start: where this rank's part begins in it.
    """

    whole: tuple[Slice, ...]
    numel: int
    start: int

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """The named tensors of a whole buffer, as views of `flat` [numel]."""
        return {s.name: flat[s.at : s.at + s.count].view(s.shape) for s in self.whole}

    def part(self, numel: int) -> tuple[Slice, ...]:
        """What of the parameters is among the `numel` elements from `start` on."""
        cut = []
        for s in self.whole:
            low, high = max(self.start, s.at), min(self.start + numel, s.at + s.count)
            if low < high:
                cut.append(Slice(s.name, s.shape, low - s.at, low - self.start, high - low))
        return tuple(cut)


@dataclass(frozen=True)
class Partition:
    """This rank's part of a group of parameters.

    Attributes:
        names: all parameters of the group, those that this rank has nothing of too.
        slices: what of them is here; between two there may be padding.
        master: fp32 [n], flat.
        parameter: what the optimizer's state is keyed by; shares its memory with `master`.
        layout: of the buffer that the parts make up; None where each parameter is cut by itself (ZeRO 3).
    """

    names: tuple[str, ...]
    slices: tuple[Slice, ...]
    master: Tensor
    parameter: Tensor
    layout: FlatLayout | None

    @property
    def is_whole(self) -> bool:
        """Whether every rank has all of it."""
        return self.layout is not None and self.master.numel() == self.layout.numel

    def take(self, named: Mapping[str, Tensor], into: Tensor) -> None:
        """Copy this rank's part of the named fp32 tensors into `into` [n]; padding is left alone."""
        for s in self.slices:
            into[s.at : s.at + s.count].copy_(named[s.name].reshape(-1)[s.first : s.first + s.count])


@dataclass(frozen=True)
class Parts:
    """One kind of state, such as a moment, as this rank has it.

    Attributes:
        partitions: which elements of which parameters it is.
        tensors: fp32 [n], flat, beside each partition's master.
    """

    partitions: Sequence[Partition]
    tensors: Sequence[Tensor]


def partitions_of(engine: Engine) -> list[Partition]:
    """The partitions of an engine, in the order of its optimizer groups."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in engine.module.named_parameters()}
    if isinstance(engine, SingleDevice):
        return [_of_group(group, names) for group in engine.groups]
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO 3
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
        return [_scattered(optimizer, parameters, master, names) for parameters, master in pairs]
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
        whole = tuple(
            Slice(names[p], p.shape, 0, (p.data_ptr() - flat.data_ptr()) // flat.element_size(), p.numel())
            for p in parameters
        )
        partitions.append(_of_layout(whole, flat.numel(), dist.get_rank() * master.numel(), master))
    return partitions


def _scattered(optimizer: Any, parameters: list[Any], master: Tensor, names: dict[Tensor, str]) -> Partition:
    """Of ZeRO 3, which cuts each parameter into equal parts, the last of them padded."""
    slices = []
    for p in parameters:
        _, at, numel = optimizer.grad_position[optimizer.get_param_id(p)]
        first = dist.get_rank() * numel
        count = min(numel, p.ds_numel - first)
        if count > 0:
            slices.append(Slice(names[p], p.ds_shape, first, at, count))
    return Partition(tuple(names[p] for p in parameters), tuple(slices), master.data, master, None)


def _of_group(group: FlatGroup, names: dict[Tensor, str]) -> Partition:
    whole = tuple(
        Slice(names[s.parameter], s.parameter.shape, 0, s.offset, s.parameter.numel()) for s in group.slots
    )
    return _of_layout(whole, group.master.numel(), 0, group.master)


def _whole(name: str, master: Tensor) -> Partition:
    return _of_layout((Slice(name, master.shape, 0, 0, master.numel()),), master.numel(), 0, master)


def _of_layout(whole: tuple[Slice, ...], numel: int, start: int, master: Tensor) -> Partition:
    layout = FlatLayout(whole, numel, start)
    names, part = tuple(s.name for s in whole), master.data.view(-1)
    return Partition(names, layout.part(part.numel()), part, master, layout)


def _chain(groups: Iterable[Iterable[Tensor]]) -> Iterable[Tensor]:
    return (tensor for group in groups for tensor in group)


def gather(partitions: Sequence[Partition], parts: Sequence[Tensor]) -> dict[str, Tensor]:
    """Put the ranks' parts together, by name, on the CPU of rank 0; the other ranks get nothing.

    The device of rank 0 sees `AT_ONCE` elements of them at a time.

    Args:
        partitions: as on every rank.
        parts: a flat tensor beside each partition's master.
    """
    named: dict[str, Tensor] = {}
    world_size = 1 if all(p.is_whole for p in partitions) else dist.get_world_size()
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    for partition, part in zip(partitions, parts, strict=True):
        if partition.is_whole:
            if is_main:
                _put(partition.slices, 0, part, named)
            continue
        slices = [slices_of(plain) for plain in gather_plain(plain_slices(partition.slices))]
        device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
        for begin in range(0, part.numel(), AT_ONCE // world_size):
            piece = part[begin : begin + AT_ONCE // world_size].to(device)
            slots = [torch.empty_like(piece) for _ in range(world_size)] if is_main else None
            dist.gather(piece, slots, dst=0)
            for cut, slot in zip(slices, slots or [], strict=False):
                _put(cut, begin, slot, named)
    return named


def _put(slices: Iterable[Slice], begin: int, piece: Tensor, named: dict[str, Tensor]) -> None:
    """Copy what `piece`, a part's elements from `begin` on, has of parameters to where they belong."""
    for s in slices:
        low, high = max(s.at, begin), min(s.at + s.count, begin + piece.numel())
        if low < high:
            whole = named.setdefault(s.name, torch.empty(s.shape)).view(-1)
            first = s.first + low - s.at
            whole[first : first + high - low].copy_(piece[low - begin : high - begin])


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
    """Set the fp32 masters, and the weights the network computes with, from named fp32 tensors.

    Of those, each rank looks at its own part only (every rank must call this).
    """
    parameters = dict(engine.module.named_parameters())
    with torch.no_grad():
        for partition in partitions:
            partition.take(weights, into=partition.master)
            if partition.layout is not None:
                whole = _together(partition, partition.layout, like=parameters[partition.names[0]])
                for name, weight in partition.layout.split(whole).items():
                    parameters[name].copy_(weight)
                continue
            for s in partition.slices:
                local: Tensor = cast(Any, parameters[s.name]).ds_tensor
                local[: s.count].copy_(partition.master[s.at : s.at + s.count])
            for name in partition.names:
                if parameters[name].numel():  # of ZeRO 3 between uses it is empty, unless it is kept whole
                    parameters[name].copy_(weights[name])


def _together(partition: Partition, layout: FlatLayout, like: Tensor) -> Tensor:
    """The master weights of all ranks, in the precision and on the device of `like`."""
    if partition.is_whole:
        return partition.master
    mine = partition.master.to(like)
    whole = mine.new_empty(layout.numel)
    all_gather(whole, mine)
    return whole


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

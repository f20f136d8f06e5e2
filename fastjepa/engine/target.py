"""The target encoder under ZeRO: an fp32 shadow cut as ZeRO cuts the optimizer, and a working copy.

    shadow  <- lerp(shadow, master, 1 - momentum)    on this rank's part, in fp32
    working <- cast(shadow)                          in the same pass
    all-gather(working)                              the target encoder's weights are views of it

At ZeRO 3 no rank has it whole: the parts of the working copy are gathered block by block while the target
encoder runs. Where the optimizer's state is kept on the host, the shadow is too.

An average kept in bf16 stalls: at momentum .996, 43 % of the weights had not moved after 8 steps. And
DeepSpeed must never see the target encoder: it would cast it, and its checkpoints would forget it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

import fastjepa_kernels as fk
from fastjepa.engine.lending import Lender, Share, all_gather
from fastjepa.engine.partitions import Partition, gather
from fastjepa.models import VisionTransformer

ENCODER = "encoder."  # how the names of the encoder's parameters begin in the student
_IN_BLOCK = re.compile(r"blocks\.(\d+)\.")


@dataclass(frozen=True)
class ShardedTarget:
    """The shadow and the working copy of a target encoder.

    Attributes:
        partitions: those of the encoder, among the student's.
        shadow: fp32, this rank's part, beside each partition's master.
        working: the same in the precision of the forward pass, on the device. Where that is fp32 and the
            shadow is there too, it is the shadow itself.
        whole: at ZeRO 0 to 2 the buffers that `working` are parts of.
        outside: at ZeRO 3 what puts the parameters outside the blocks together, once for each update.
    """

    partitions: list[Partition]
    shadow: list[Tensor]
    working: list[Tensor]
    whole: list[Tensor]
    outside: Lender | None = None

    @torch.no_grad()
    def update(self, momentum: float | Tensor) -> None:
        """Follow the encoder's fp32 master weights by one step."""
        masters = [partition.master for partition in self.partitions]
        together = not self._is_shadow() and self.working[0].device == self.shadow[0].device
        fk.ema_update_(self.shadow, masters, momentum, working=self.working if together else None)
        self._spread(cast=not together)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Set shadow and working copy from fp32 tensors, named as in the student (``encoder.…``)."""
        for partition, shadow in zip(self.partitions, self.shadow, strict=True):
            partition.take(weights, into=shadow)
        self._spread(cast=True)

    def gather_shadow(self) -> dict[str, Tensor]:
        """The fp32 target encoder by name, on rank 0, named as in the student."""
        return gather(self.partitions, self.shadow)

    def _is_shadow(self) -> bool:
        return all(w is s for w, s in zip(self.working, self.shadow, strict=True))

    def _spread(self, cast: bool) -> None:
        """Let the other ranks have this one's part of the working copy."""
        if cast and not self._is_shadow():
            torch._foreach_copy_(self.working, self.shadow)
        if self.outside is not None:
            self.outside.put_together(0)
        for partition, whole, part in zip(self.partitions, self.whole, self.working, strict=False):
            if not partition.is_whole:
                all_gather(whole, part)


def shard_target(
    target_encoder: VisionTransformer, partitions: list[Partition], dtype: torch.dtype, device: torch.device
) -> ShardedTarget:
    """Build the shadow beside the encoder's partitions and point the target encoder's weights at the copy.

    Args:
        target_encoder: of the encoder's architecture; its weights are replaced by views, at ZeRO 3 by what
            its blocks are lent.
        partitions: the student's, from `partitions_of`.
        dtype: the precision that the target encoder computes in.
        device: that it computes on. The shadow is where the masters are.
    """
    mine = [p for p in partitions if p.names[0].startswith(ENCODER)]
    shadow = [partition.master.clone() for partition in mine]
    target_encoder.to(device=device, dtype=dtype)
    parameters = {ENCODER + name: parameter for name, parameter in target_encoder.named_parameters()}
    missing = parameters.keys() ^ {name for partition in mine for name in partition.names}
    assert not missing, f"target weights without a partition, or the reverse: {sorted(missing)}"
    if mine[0].layout is None:
        working = [_in_precision(part, dtype, device) for part in shadow]
        return ShardedTarget(mine, shadow, working, [], _lend(target_encoder, mine, working))
    whole, working = [], []
    for partition, part in zip(mine, shadow, strict=True):
        layout = partition.layout
        assert layout is not None
        if partition.is_whole:
            whole.append(_in_precision(part, dtype, device))
            working.append(whole[-1])
        else:
            whole.append(torch.zeros(layout.numel, dtype=dtype, device=device))
            working.append(whole[-1][layout.start : layout.start + part.numel()])
        for name, view in layout.split(whole[-1]).items():
            parameters[name].data = view
    return ShardedTarget(mine, shadow, working, whole)


def _in_precision(part: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor itself where it is so already."""
    return part.to(device=device, dtype=dtype)


def _lend(encoder: VisionTransformer, partitions: list[Partition], working: list[Tensor]) -> Lender:
    """Have each block's weights together only while it runs.

    Returns:
        What does the same for the weights outside the blocks.
    """
    here = {
        s.name.removeprefix(ENCODER): part[s.at : s.at + s.count]
        for partition, part in zip(partitions, working, strict=True)
        for s in partition.slices
    }
    nothing, ranks = working[0].new_empty(0), dist.get_world_size()
    units: list[list[Share]] = [[] for _ in range(len(encoder.blocks) + 1)]
    for name, parameter in encoder.named_parameters():
        share = Share(parameter, parameter.shape, here.get(name, nothing), -(-parameter.numel() // ranks))
        found = _IN_BLOCK.match(name)
        units[int(found[1]) if found else -1].append(share)
    encoder.blocks.lend = Lender(units[:-1]).lend
    return Lender(units[-1:])

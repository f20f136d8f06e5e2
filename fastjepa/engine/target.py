"""The target encoder under ZeRO: an fp32 shadow cut as ZeRO cuts the optimizer, and a working copy.

    shadow  <- lerp(shadow, master, 1 - momentum)    on this rank's part, in fp32
    working <- cast(shadow)                          in the same pass
    all-gather(working)                              the target encoder's weights are views of it

An average kept in bf16 stalls: at momentum .996, 43 % of the weights had not moved after 8 steps. And
DeepSpeed must never see the target encoder: it would cast it, and its checkpoints would forget it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastjepa_kernels as fk
from fastjepa.engine.partitions import Partition, gather

# torch 2.14 renames it and warns of the old name; 2.11 knows the old one alone.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
ENCODER = "encoder."  # how the names of the encoder's parameters begin in the student


@dataclass(frozen=True)
class ShardedTarget:
    """The shadow and the working copy of a target encoder.

    Attributes:
        partitions: those of the encoder, among the student's.
        shadow: fp32, this rank's part, beside each partition's master.
        working: the whole groups in the precision of the forward pass. Where a rank owns a whole group
            and computes in fp32, it is the shadow itself.
    """

    partitions: list[Partition]
    shadow: list[Tensor]
    working: list[Tensor]

    @torch.no_grad()
    def update(self, momentum: float | Tensor) -> None:
        """Follow the encoder's fp32 master weights by one step."""
        masters = [partition.master for partition in self.partitions]
        parts = self._own_parts()
        fk.ema_update_(self.shadow, masters, momentum, working=None if self._is_shadow() else parts)
        self._gather_working(parts)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Set shadow and working copy from fp32 tensors, named as in the student (``encoder.…``)."""
        for partition, shadow in zip(self.partitions, self.shadow, strict=True):
            partition.take(weights, into=shadow)
        parts = self._own_parts()
        if not self._is_shadow():
            torch._foreach_copy_(parts, self.shadow)
        self._gather_working(parts)

    def gather_shadow(self) -> dict[str, Tensor]:
        """The fp32 target encoder by name, on rank 0, named as in the student."""
        return gather(self.partitions, self.shadow)

    def _is_shadow(self) -> bool:
        return all(w is s for w, s in zip(self.working, self.shadow, strict=True))

    def _own_parts(self) -> list[Tensor]:
        return [
            whole[partition.start : partition.start + shadow.numel()]
            for partition, whole, shadow in zip(self.partitions, self.working, self.shadow, strict=True)
        ]

    def _gather_working(self, parts: list[Tensor]) -> None:
        for partition, whole, part in zip(self.partitions, self.working, parts, strict=True):
            if not partition.is_whole:
                _all_gather(whole, part)


def shard_target(target_encoder: nn.Module, partitions: list[Partition], dtype: torch.dtype) -> ShardedTarget:
    """Build the shadow beside the encoder's partitions and point the target encoder's weights at the copy.

    Args:
        target_encoder: of the encoder's architecture; its weights are replaced by views.
        partitions: the student's, from `partitions_of`.
        dtype: the precision that the target encoder computes in.
    """
    mine = [p for p in partitions if p.pieces[0].name.startswith(ENCODER)]
    shadow = [partition.master.clone() for partition in mine]
    working = [
        part
        if partition.is_whole and dtype == torch.float32
        else part.new_zeros(partition.group_numel, dtype=dtype)
        for partition, part in zip(mine, shadow, strict=True)
    ]
    target_encoder.to(device=shadow[0].device, dtype=dtype)
    parameters = dict(target_encoder.named_parameters())
    for partition, whole in zip(mine, working, strict=True):
        for name, view in partition.split(whole).items():
            parameters.pop(name.removeprefix(ENCODER)).data = view
    assert not parameters, f"target weights without a partition: {sorted(parameters)}"
    return ShardedTarget(mine, shadow, working)

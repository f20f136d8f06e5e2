"""Bytes of a rank under each ZeRO stage, cut and padded as DeepSpeed 0.19.8 does it. Training in bf16.

What DeepSpeed keeps was read in its source and is held to a real run by tests/planning/test_memory.py:

    stage 0   bf16 gradients while a step lasts, fp32 copies of them all for the update; without DeepSpeed
              they are always there, and their fp32 sum over several micro-batches too
    stage 1   (its bf16 optimizer) whole fp32 gradients, always, and bf16 ones while a step lasts
    stage 2   this rank's part of the fp32 gradients while a step lasts, from its first micro-batch on
    stage 3   this rank's part of the fp32 gradients, always, and a bucket
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from fastjepa.engine.single import ALIGNED
from fastjepa.planning.activations import (
    Kept,
    backward_bytes,
    forward_bytes,
    left_bytes,
    target_bytes,
)
from fastjepa.planning.networks import Group, Network
from fastjepa.planning.tokens import Tokens

BF16, FP32 = 2, 4  # bytes
STAGES = (0, 1, 2, 3)
DEFAULT = 2  # of several ranks without accumulation
# Elements that stage 0 and stage 1 flatten and reduce together: DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE.
FALLBACK_BUCKET = 500_000_000


@dataclass(frozen=True)
class Split:
    """How the state is cut.

    Attributes:
        stage: of ZeRO.
        ranks: among which.
        bucket: elements that are reduced together, as the engine asks DeepSpeed for.
        reuse: elements of the student within whose use ZeRO 3 keeps a gathered weight for its next use.
        on_gpu: gradients are reduced while others are computed, in a second bucket, and norms need no copies.
        accumulates: gradients of several micro-batches are summed, in fp32.
    """

    stage: int
    ranks: int
    bucket: int
    reuse: int = 0
    on_gpu: bool = True
    accumulates: bool = False

    @property
    def is_alone(self) -> bool:
        """One process at stage 0 trains without DeepSpeed."""
        return self.stage == 0 and self.ranks == 1


@dataclass(frozen=True)
class State:
    """Bytes of a rank that live from step to step."""

    weights: float  # of the student, that it computes with
    gradients: float
    master: float
    moments: float
    shadow: float  # fp32, of the target encoder
    target: float  # its working copy
    buffers: float  # of ZeRO 3: a bucket for gradients, room for two blocks of the target encoder

    @property
    def total(self) -> float:
        return float(sum(getattr(self, field.name) for field in fields(self)))


@dataclass(frozen=True)
class Step:
    """Bytes of a rank that a step takes besides.

    Attributes:
        gradients: at the end of the backward pass.
        buckets: in which they are reduced.
        gathered: whole weights of the student; of ZeRO 3.
        update: what reducing or the update itself has in hand.
        is_early: that begins with the first bucket, when most activations are there; else it is after the
            last.
        is_carried: the gradients are there already when the backward pass of the last micro-batch begins.
    """

    gradients: float
    buckets: float
    gathered: float
    update: float
    is_early: bool = False
    is_carried: bool = False


def padded(group: Group, stage: int, ranks: int) -> int:
    """Elements of a group once it can be cut into equal parts."""
    if stage == 3:
        return sum(_up(numel, ranks) for numel in group.numels)
    if stage in (1, 2):
        return _up(group.numel, 2 * ranks)  # each part begins on a multiple of four bytes
    return sum(_up(numel, ALIGNED) for numel in group.numels) if ranks == 1 else group.numel


def part(group: Group, stage: int, ranks: int) -> int:
    """Elements that a rank has of a group whose optimizer state is cut."""
    return padded(group, stage, ranks) // (ranks if stage else 1)


def state(groups: Sequence[Group], split: Split, block: int, outside: int) -> State:
    """Of a rank, between steps.

    Args:
        groups: of the student.
        split: how it is cut.
        block: parameters of an encoder's block.
        outside: of the encoder, outside its blocks.
    """
    stage, ranks = split.stage, split.ranks
    whole = sum(padded(group, stage, ranks) for group in groups)
    mine = sum(part(group, stage, ranks) for group in groups)
    of_encoder = [group for group in groups if group.is_encoder]
    target, shadow = (sum(count(group, stage, ranks) for group in of_encoder) for count in (padded, part))
    alone = (BF16 + FP32 * split.accumulates) * whole * split.is_alone
    gradients = {0: alone, 1: FP32 * whole, 2: 0, 3: FP32 * mine}[stage]
    buffers = 0.0
    if stage == 3:  # of the target encoder: parts, parts of all ranks, and whole, for two blocks
        buffers = BF16 * (split.bucket + (2 + 1 / ranks) * (2 * block + outside))
    return State(
        weights=BF16 * (mine if stage == 3 else whole),
        gradients=gradients,
        master=FP32 * mine,
        moments=2 * FP32 * mine,
        shadow=FP32 * shadow,
        target=BF16 * (shadow if stage == 3 else target),
        buffers=buffers,
    )


def step(groups: Sequence[Group], split: Split, block: int) -> Step:
    """Of a rank, while a step lasts; `block` as of `state`."""
    stage, ranks = split.stage, split.ranks
    whole = sum(padded(group, stage, ranks) for group in groups)
    mine = sum(part(group, stage, ranks) for group in groups)
    flat = min(whole, FALLBACK_BUCKET)
    bucket = BF16 * split.bucket
    match stage:
        case 0 if (
            split.is_alone
        ):  # autograd's own, before they are copied into the flat ones; or for the norm
            on_cpu = FP32 + BF16 * split.accumulates
            return Step(0.0, 0.0, 0.0, (BF16 if split.on_gpu else on_cpu) * whole)
        case 0:
            return Step(BF16 * whole, 0.0, 0.0, max(FP32 * whole, BF16 * flat))
        case 1:  # flattened in fp32, and cast
            return Step(BF16 * whole, 0.0, 0.0, (FP32 + BF16) * flat, is_carried=split.accumulates)
        case 2:
            buckets = bucket * (2 if split.on_gpu else 1)
            return Step(FP32 * mine, buckets, 0.0, buckets + bucket, True, split.accumulates)
        case 3:
            return Step(0.0, bucket, BF16 * gathered(whole, split, block), 0.0)
    raise ValueError(f"ZeRO has stages 0 to 3, got {stage}")


def kept_whole(numel: int, split: Split) -> int:
    """Elements of the student that ZeRO 3 does not release between their forward and their backward pass.

    Those that are used again within `reuse` elements, of the forward pass still to come and of the backward
    pass so far: all of a small network, of a large one the last blocks.
    """
    return min(numel, split.reuse // 2)


def gathered(numel: int, split: Split, block: int) -> int:
    """Elements of the student that are whole when the backward pass begins; one rank gathers nothing.

    What comes ahead of its use fills stage3_max_live_parameters, which are two buckets, whatever is kept. As
    much as is gathered at once, a block, is there twice: in one piece until all of it is in use.
    """
    if split.ranks == 1:
        return 0
    whole = max(kept_whole(numel, split), 2 * split.bucket)
    return whole + block if whole < numel else numel


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank.

    Attributes:
        state: between steps.
        step: while one lasts.
        activations: kept from the forward for the backward pass.
        left: of them when the first bucket of gradients is full.
        working: in hand while a block's backward pass, or the target encoder's forward pass, runs.
    """

    state: State
    step: Step
    activations: float
    left: float
    working: float

    @property
    def begin(self) -> float:
        """Beside the state, as the backward pass begins."""
        carried = self.step.gradients * self.step.is_carried
        return self.activations + self.working + self.step.buckets + self.step.gathered + carried

    @property
    def end(self) -> float:
        """Beside the state, once its first bucket is sent, or in the update."""
        return self.left * self.step.is_early + self.step.gradients + self.step.update

    @property
    def peak(self) -> float:
        """The most at any time."""
        return self.state.total + max(self.begin, self.end)


def memory_of(
    network: Network, split: Split, tokens: Tokens, checkpointed: bool, fused: bool = True
) -> Memory:
    """Of a rank on a GPU.

    Args:
        network: with its objective.
        split: how its state is cut.
        tokens: of a micro-batch.
        checkpointed: as `speed.checkpoint_blocks`.
        fused: as `speed.fused_blocks`.
    """
    kept = Kept(remade=fused, checkpointed=checkpointed)
    working = backward_bytes(network, tokens, kept)
    block = network.block_parameters
    if network.is_mae:
        between = replace(state(network.groups, split, 0, 0), shadow=0.0, target=0.0)
    else:
        outside = network.encoder_parameters - network.shape.depth * block
        between = state(network.groups, split, block, outside)
        working = max(working, target_bytes(network, tokens) * checkpointed)
    return Memory(
        between,
        step(network.groups, split, block),
        forward_bytes(network, tokens, kept),
        left_bytes(network, tokens, kept, split.bucket),
        working,
    )


def _up(numel: int, multiple: int) -> int:
    return -(-numel // multiple) * multiple

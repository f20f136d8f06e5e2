"""What the ranks of a step send one another, how long it takes, and how much of that is seen.

An alpha-beta model: a message takes its latency for each hop and its bytes over the rate of the link. Rings,
in a node and between nodes: an all-gather or a reduce-scatter of S bytes among n ranks is n - 1 hops of S / n
bytes each, an all-reduce twice that (Patarasu and Yuan, 2009).

When DeepSpeed 0.19.8 sends what was read in its source. At stage 0 and in the optimizer that it takes at
stage 1 for bf16, gradients are reduced when the backward pass is over, all of them seen. At stage 2 a bucket
is reduced while the next one is computed, by an all-reduce of which each rank keeps its part. At stage 3 by a
reduce-scatter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

from fastjepa.planning.memory import BF16, FALLBACK_BUCKET, Split, kept_whole, padded
from fastjepa.planning.networks import Group

Kind = Literal["all-reduce", "reduce-scatter", "all-gather"]
Ring = Literal["hierarchical", "flat"]
Schedule = Literal["deepspeed", "bucketed"]
Behind = Literal["nothing", "target", "forward", "backward"]


@dataclass(frozen=True)
class Cluster:
    """Links between GPUs.

    Attributes:
        gpus_per_node: that share the faster link.
        node_bytes_per_s: of a GPU, to the others of its node.
        network_bytes_per_s: of a GPU, out of its node.
        node_latency_s, network_latency_s: of a hop.
        ring: hierarchical: the ranks of a node share out a message, and ranks of the same place in all nodes
            send each its share; flat: as many rings through all GPUs as a node has, each leaving it by
            another card.
    """

    gpus_per_node: int = 8
    node_bytes_per_s: float = 450e9
    network_bytes_per_s: float = 50e9
    node_latency_s: float = 3e-6
    network_latency_s: float = 10e-6
    ring: Ring = "hierarchical"


def collective_s(kind: Kind, payload: float, ranks: int, cluster: Cluster) -> float:
    """Seconds of one collective of `payload` bytes, those of the whole tensor, among `ranks`."""
    if ranks == 1 or payload == 0:
        return 0.0
    passes = 2 if kind == "all-reduce" else 1
    local = min(ranks, cluster.gpus_per_node)
    nodes = ceil(ranks / cluster.gpus_per_node)
    if nodes == 1:
        return passes * _ring_s(payload, local, cluster.node_bytes_per_s, cluster.node_latency_s)
    if cluster.ring == "flat":
        rate = min(cluster.node_bytes_per_s, local * cluster.network_bytes_per_s)
        hops = nodes * cluster.network_latency_s + (ranks - 1 - nodes) * cluster.node_latency_s
        return passes * (payload * (ranks - 1) / ranks / rate + hops)
    inside = _ring_s(payload, local, cluster.node_bytes_per_s, cluster.node_latency_s)
    between = _ring_s(payload / local, nodes, cluster.network_bytes_per_s, cluster.network_latency_s)
    return passes * (inside + between)


def _ring_s(payload: float, ranks: int, bytes_per_s: float, latency_s: float) -> float:
    return (ranks - 1) * (payload / ranks / bytes_per_s + latency_s)


@dataclass(frozen=True)
class Message:
    """A tensor that is sent in equal pieces.

    Attributes:
        name: for people.
        kind: of the collective.
        payload: bytes of the whole tensor.
        pieces: in which it is sent.
        behind: what is computed at the same time, piece by piece.
        times: in a step.
    """

    name: str
    kind: Kind
    payload: float
    pieces: int
    behind: Behind
    times: int = 1

    def piece_s(self, ranks: int, cluster: Cluster) -> float:
        return collective_s(self.kind, self.payload / self.pieces, ranks, cluster)

    def whole_s(self, ranks: int, cluster: Cluster) -> float:
        """Seconds of the links in a step, seen or not."""
        return self.times * self.pieces * self.piece_s(ranks, cluster)


def exposed_s(sent: Sequence[tuple[float, int]], behind_s: float) -> float:
    """Seconds that are seen of messages sent piece by piece, each piece behind the computation of the next.

    The first of a message has nothing before it, or the last nothing after it: one piece is always seen, and
    of the others what takes longer than the computation that is left.

    Args:
        sent: of each message, seconds of a piece and how many there are. They share the links.
        behind_s: of the computation.
    """
    if not sent:
        return 0.0
    first = sum(piece_s for piece_s, _ in sent)
    rest = sum(piece_s * (pieces - 1) for piece_s, pieces in sent)
    most = max(pieces for _, pieces in sent)
    return first + max(0.0, rest - behind_s * (most - 1) / most)


def messages(
    groups: Sequence[Group],
    split: Split,
    blocks: int,
    accumulation: int = 1,
    schedule: Schedule = "deepspeed",
) -> list[Message]:
    """Of a step.

    Args:
        groups: of the student.
        split: how its state is cut.
        blocks: of the encoder, one after another of which ZeRO 3 gathers.
        accumulation: micro-batches, after each of which stages 2 and 3 reduce.
        schedule: deepspeed: as it does; bucketed: as if every stage reduced in buckets behind the backward
            pass, to where the result is needed.
    """
    stage = split.stage
    student = sum(padded(group, stage, split.ranks) for group in groups)
    target = BF16 * sum(padded(group, stage, split.ranks) for group in groups if group.is_encoder)
    gradients = _gradients(BF16 * student, student, split, accumulation, schedule)
    match stage:
        case 0:
            return [gradients]
        case 1 | 2:
            pieces = ceil(student / split.bucket)
            return [
                gradients,
                Message("weights", "all-gather", BF16 * student, pieces, "nothing"),
                Message("target", "all-gather", target, 2, "nothing"),  # decayed and not
            ]
    again = BF16 * (student - kept_whole(student, split))
    found = [
        gradients,
        Message("weights, forward", "all-gather", BF16 * student, blocks, "forward", accumulation),
        Message("target, block by block", "all-gather", target, blocks, "target", accumulation),
    ]
    if again > 0:
        pieces = max(1, round(blocks * again / (BF16 * student)))
        found.append(Message("weights, backward", "all-gather", again, pieces, "backward", accumulation))
    return found


def _gradients(payload: float, numel: int, split: Split, accumulation: int, schedule: Schedule) -> Message:
    buckets = ceil(numel / split.bucket)
    if schedule == "bucketed":
        kind: Kind = "reduce-scatter" if split.stage else "all-reduce"
        return Message(
            "gradients", kind, payload, buckets, "backward", accumulation if split.stage > 1 else 1
        )
    if split.stage < 2:
        return Message("gradients", "all-reduce", payload, ceil(numel / FALLBACK_BUCKET), "nothing")
    kind = "all-reduce" if split.stage == 2 else "reduce-scatter"
    return Message("gradients", kind, payload, buckets, "backward", accumulation)

"""A step on many GPUs: what was measured on one, scaled by FLOPs, and what the others add.

    step = max(compute, host) + passes over gradients and optimizer state + messages that are seen

The host's part is there because a run of several ranks replays no graph: it launches every kernel.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from bench.scale_model.measured import Measured
from bench.scale_model.networks import published_masks
from bench.scale_model.traffic import Behind, Cluster, Schedule, exposed_s, messages
from fastjepa.engine.launch import bucket_elements
from fastjepa.models import SIZES
from fastjepa.models.flops import NO_GRADIENT, Parts, ijepa, useful
from fastjepa.models.flops import Tokens as FlopTokens
from fastjepa.planning.memory import Memory, Split, memory_of, part
from fastjepa.planning.networks import Network
from fastjepa.planning.tokens import Seen, Tokens, most_seen_in, seen_in

# Bytes moved for each parameter that a rank has the state of: master, two moments and gradient read, the
# first three and the weight written; the average besides, for each of the encoder's.
UPDATE_BYTES, AVERAGE_BYTES = 30, 10
# For each parameter of the student on every rank, as DeepSpeed's passes over gradients were read to be.
#   0  norm and overflow 4, to fp32 6, scaled 8, flattened and back 8
#   1  summed in fp32 18, flattened 8, cast and back 12, divided 4, copied back 8, norm 4, zeroed 4
#   2  into a bucket 4, divided 4, flattened 4
#   3  the same, and gathered weights are laid out
GRADIENT_BYTES = {0: 26, 1: 58, 2: 12, 3: 16}


@dataclass(frozen=True)
class Base:
    """What a network's times stand on.

    Attributes:
        network: that is scaled.
        measured: of its own size, or of the nearest.
        is_own: which of them.
        kernels: of a step, scaled by blocks where it is not its own.
    """

    network: Network
    measured: Measured
    is_own: bool
    kernels: float

    @property
    def update_s(self) -> float:
        """Of the fused update on one device, at the rate of a copy."""
        network = self.network
        moved = UPDATE_BYTES * network.parameters + AVERAGE_BYTES * network.encoder_parameters
        return moved / self.measured.copy_bytes_per_s

    def image_s(self, seen: Seen) -> float:
        """Of computing one image of a step, the update aside."""
        flop = image_flop(self.network, seen)
        if not self.is_own:
            return flop / self.measured.flop_per_s
        alone = (self.measured.step_s - self.update_s) / self.measured.batch
        return alone * flop / self.measured.useful_flop


@dataclass(frozen=True)
class Options:
    """What is assumed.

    Attributes:
        cluster: its links.
        schedule: when gradients are sent.
        launch_s: of the host for each kernel; 0 as with CUDA graphs, None as measured for the reference.
        checkpointed: `speed.checkpoint_blocks`.
        usable: share of a device's memory that a step may take.
    """

    cluster: Cluster = field(default_factory=Cluster)
    schedule: Schedule = "deepspeed"
    launch_s: float | None = None
    checkpointed: bool = False
    usable: float = 0.92


@dataclass(frozen=True)
class Prediction:
    """A step of `gpus` ranks.

    Attributes:
        batch: images of a rank, of all its `accumulation` micro-batches.
        compute_s: of the device; host_s: of launching it.
        update_s: passes over gradients, optimizer state and the target's average.
        sent_s: seconds of the links, of which exposed_s are seen.
        context_tokens: of an image, the mean.
        efficiency: useful FLOP/s of a GPU over those of one alone at the measured batch: more context in
            smaller micro-batches is more work, and no loss.
        peak_bytes: of a rank; fits: in what the device has, with this accumulation.
    """

    network: str
    stage: int
    gpus: int
    batch: int
    accumulation: int
    compute_s: float
    host_s: float
    update_s: float
    sent_s: float
    exposed_s: float
    step_s: float
    images_per_s: float
    context_tokens: float
    efficiency: float
    peak_bytes: float
    state_bytes: float
    fits: bool


def base_of(network: Network, measured: Mapping[str, Measured]) -> Base:
    """The measured size itself, or the one with the nearest FLOPs of an image."""
    if network.name in measured:
        own = measured[network.name]
        return Base(network, own, True, own.kernels)
    flop = image_flop(network, seen_in(published_masks(network), 64))
    near = min(measured.values(), key=lambda each: abs(each.useful_flop - flop))
    return Base(network, near, False, near.kernels * _blocks(network.name) / _blocks(near.size))


def _blocks(size: str) -> int:
    return SIZES[size].depth + SIZES[size].predictor_depth


def parts_of(network: Network, seen: Seen) -> Parts:
    """FLOPs of an image with full blocks, part by part."""
    return ijepa(network.shape, network.predictor, FlopTokens([seen.context], seen.target, seen.blocks))


def image_flop(network: Network, seen: Seen) -> float:
    """Useful ones, backward as twice forward."""
    return useful(parts_of(network, seen))


def predict(base: Base, stage: int, gpus: int, batch: int, options: Options) -> Prediction:
    """A step of `batch` images on each of `gpus`, in as few micro-batches as memory allows."""
    network = base.network
    bucket = bucket_elements(network.shape.width)
    split = Split(stage, gpus, bucket, reuse=bucket)  # as the engine asks for
    room = options.usable * base.measured.memory_bytes
    # bf16 gradients of several micro-batches are not summed at stage 0: the engine refuses.
    most = 1 if stage == 0 and gpus > 1 else batch
    divisors = [each for each in range(1, most + 1) if batch % each == 0]
    for accumulation in divisors:
        images = batch // accumulation
        tokens = Tokens(images, most_seen_in(published_masks(network), images))
        memory = memory_of(network, split, tokens, options.checkpointed)
        if memory.peak <= room:
            break
    return _timed(base, split, images, accumulation, memory, memory.peak <= room, options)


def _timed(
    base: Base, split: Split, images: int, accumulation: int, memory: Memory, fits: bool, options: Options
) -> Prediction:
    network, gpus, measured = base.network, split.ranks, base.measured
    seen = seen_in(published_masks(network), images)
    compute_s = base.image_s(seen) * images
    windows = shares(network, seen)
    if options.checkpointed:
        compute_s *= 1 + windows["forward"]
    launch_s = measured.launch_s if options.launch_s is None else options.launch_s
    host_s = 0.0 if split.is_alone else base.kernels * launch_s
    busy_s = max(compute_s, host_s)  # of a micro-batch

    sent = messages(network.groups, split, network.shape.depth, accumulation, options.schedule)
    whole_s = exposed = 0.0
    for window in (*windows, "nothing"):
        group = [each for each in sent if each.behind == window]
        whole_s += sum(each.whole_s(gpus, options.cluster) for each in group)
        if window == "nothing":
            exposed += sum(each.whole_s(gpus, options.cluster) for each in group)
            continue
        pieces = [(each.piece_s(gpus, options.cluster), each.pieces) for each in group]
        times = max((each.times for each in group), default=1)
        exposed += times * exposed_s(pieces, busy_s * windows[window])

    update_s = _update_s(base, split, accumulation)
    step_s = accumulation * busy_s + update_s + exposed
    batch = images * accumulation
    seen_alone = seen_in(published_masks(network), measured.batch)
    alone_s = base.image_s(seen_alone) + base.update_s / measured.batch
    alone = image_flop(network, seen_alone) / alone_s
    return Prediction(
        network=network.title,
        stage=split.stage,
        gpus=gpus,
        batch=batch,
        accumulation=accumulation,
        compute_s=accumulation * compute_s,
        host_s=accumulation * host_s,
        update_s=update_s,
        sent_s=whole_s,
        exposed_s=exposed,
        step_s=step_s,
        images_per_s=gpus * batch / step_s,
        context_tokens=seen.context,
        efficiency=batch * image_flop(network, seen) / step_s / alone,
        peak_bytes=memory.peak,
        state_bytes=memory.state.total,
        fits=fits,
    )


def shares(network: Network, seen: Seen) -> dict[Behind, float]:
    """Of the device's time, by the FLOPs that are run: what messages can be sent behind."""
    parts = parts_of(network, seen)
    whole = sum(part.total for part in parts.values())
    target = sum(part.forward for name, part in parts.items() if name in NO_GRADIENT)
    backward = sum(part.backward for part in parts.values())
    return {
        "target": target / whole,
        "forward": (whole - target - backward) / whole,
        "backward": backward / whole,
    }


def _update_s(base: Base, split: Split, accumulation: int) -> float:
    """Passes over gradients and state, at the measured rate of a copy."""
    if split.is_alone:
        return base.update_s
    groups = base.network.groups
    mine = sum(part(group, split.stage, split.ranks) for group in groups)
    average = sum(part(group, split.stage, split.ranks) for group in groups if group.is_encoder)
    times = accumulation if split.stage >= 2 else 1
    moved = UPDATE_BYTES * mine + AVERAGE_BYTES * average
    moved += times * GRADIENT_BYTES[split.stage] * base.network.parameters
    return moved / base.measured.copy_bytes_per_s

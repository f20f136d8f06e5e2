"""Which micro-batch fits into a GPU, and what its memory goes to."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from itertools import takewhile

from fastjepa.planning.memory import Memory


@dataclass(frozen=True)
class Parts:
    """Bytes of a GPU when a step holds the most.

    Attributes:
        weights: that are trained, as they are computed with; of ZeRO 3 this rank's part and what is gathered.
        gradients: in bf16, in fp32 where they are summed.
        optimizer: fp32 master weights and both moments.
        shadow: of the target encoder, in fp32.
        target: its working copy.
        activations: kept from the forward for the backward pass.
        working: in hand while a block's backward pass, or the update, runs.
        buffers: in which ZeRO reduces and gathers.
    """

    weights: float
    gradients: float
    optimizer: float
    shadow: float
    target: float
    activations: float
    working: float
    buffers: float

    @property
    def total(self) -> float:
        return float(sum(getattr(self, field.name) for field in fields(self)))


def parts_of(memory: Memory) -> Parts:
    """The parts at the peak, which sum up to it."""
    state, step = memory.state, memory.step
    between = Parts(
        weights=state.weights,
        gradients=state.gradients,
        optimizer=state.master + state.moments,
        shadow=state.shadow,
        target=state.target,
        activations=0.0,
        working=0.0,
        buffers=state.buffers,
    )
    if memory.begin >= memory.end:
        return replace(
            between,
            weights=state.weights + step.gathered,
            gradients=state.gradients + step.gradients * step.is_carried,
            activations=memory.activations,
            working=memory.working,
            buffers=state.buffers + step.buckets,
        )
    return replace(
        between,
        gradients=state.gradients + step.gradients,
        activations=memory.left * step.is_early,
        working=step.update,
    )


def on_host(memory: Memory) -> tuple[Memory, float]:
    """With `speed.offload_optimizer`: what is left on the GPU, at most, and bytes of the host for each rank.

    Gradients are counted on the GPU still, where DeepSpeed has them for a while.
    """
    state = memory.state
    moved = state.master + state.moments + state.shadow
    return replace(memory, state=replace(state, master=0.0, moments=0.0, shadow=0.0)), moved


def divisors(number: int) -> list[int]:
    """From the smallest on."""
    small = [each for each in range(1, int(number**0.5) + 1) if number % each == 0]
    return sorted({*small, *(number // each for each in small)})


def largest_that_fits(sizes: Iterable[int], peak_of: Callable[[int], float], room: float) -> int | None:
    """Of `sizes` the last, from the smallest on, before one whose peak is above `room`; None without any."""
    fitting = list(takewhile(lambda size: peak_of(size) <= room, sorted(sizes)))
    return fitting[-1] if fitting else None

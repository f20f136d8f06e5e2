"""The tokens that a step sees, whose number masks change from step to step."""

from dataclasses import dataclass
from functools import cache

import torch

from fastjepa.masks import MultiBlockMasks, RandomMasks

STEPS_SAMPLED = 128  # of masks
Sampler = MultiBlockMasks | RandomMasks


@dataclass(frozen=True)
class Seen:
    """Tokens of an image in a step, or their means over steps.

    Attributes:
        context: K.
        target: of one of the M blocks, P.
        asked: rows of the target encoder that some block asks for.
        blocks: M.
    """

    context: float
    target: float
    asked: float
    blocks: int = 4


@dataclass(frozen=True)
class Tokens:
    """Of one forward pass over `images` of a rank."""

    images: int
    seen: Seen

    @property
    def context(self) -> float:
        """Rows of the context encoder, B K."""
        return self.images * self.seen.context

    @property
    def asked(self) -> float:
        """Predicted rows, M B P."""
        return self.images * self.seen.blocks * self.seen.target

    @property
    def stream(self) -> float:
        """Rows of the predictor: context and block, for each of M blocks."""
        return self.seen.blocks * self.context + self.asked


@cache
def draws_of(sampler: Sampler, images: int) -> tuple[Seen, ...]:
    """Steps of masks of so many images each. Cut to their minimum, the fewer they are, the more context."""
    if isinstance(sampler, RandomMasks):
        return (Seen(sampler.kept, sampler.patches - sampler.kept, asked=0, blocks=1),)
    draws = []
    for step in range(1 if sampler.mode == "budget" else STEPS_SAMPLED):
        masks = sampler.sample(torch.arange(images) + step * images, step=step)
        assert masks.asked_rows is not None, "masks drawn on the CPU say which rows are asked for"
        blocks, _, target = masks.targets.shape
        context = masks.context.numel() / images  # of contexts of unequal length, the mean
        draws.append(Seen(context, target, len(masks.asked_rows) / images, blocks))
    return tuple(draws)


def seen_in(sampler: Sampler, images: int) -> Seen:
    """The mean over steps, by which a step takes its time."""
    draws = draws_of(sampler, images)
    return Seen(
        sum(each.context for each in draws) / len(draws),
        sum(each.target for each in draws) / len(draws),
        sum(each.asked for each in draws) / len(draws),
        draws[0].blocks,
    )


def most_seen_in(sampler: Sampler, images: int) -> Seen:
    """The largest step, which has to fit into memory."""
    return max(draws_of(sampler, images), key=lambda each: each.blocks * (each.context + each.target))

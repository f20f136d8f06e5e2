"""The tokens that a step sees, whose number masks change from step to step."""

from dataclasses import dataclass
from functools import cache

import torch

from fastjepa.masks import MultiBlockMasks

STEPS_SAMPLED = 128  # of masks


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
def draws_of(sampler: MultiBlockMasks, images: int) -> tuple[Seen, ...]:
    """Steps of masks of so many images each. Cut to their minimum, the fewer they are, the more context."""
    draws = []
    for step in range(STEPS_SAMPLED):
        masks = sampler.sample(torch.arange(images) + step * images, step=step)
        assert masks.asked_rows is not None, "masks drawn on the CPU say which rows are asked for"
        blocks, _, target = masks.targets.shape
        context = masks.context.numel() / images  # of contexts of unequal length, the mean
        draws.append(Seen(context, target, len(masks.asked_rows) / images, blocks))
    return tuple(draws)


def seen_in(sampler: MultiBlockMasks, images: int) -> Seen:
    """The mean over steps, by which a step takes its time."""
    draws = draws_of(sampler, images)
    return Seen(
        sum(each.context for each in draws) / len(draws),
        sum(each.target for each in draws) / len(draws),
        sum(each.asked for each in draws) / len(draws),
        sampler.target_blocks,
    )


def most_seen_in(sampler: MultiBlockMasks, images: int) -> Seen:
    """The largest step, which has to fit into memory."""
    return max(draws_of(sampler, images), key=lambda each: each.blocks * (each.context + each.target))

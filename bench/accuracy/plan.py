"""What is to be run, in which order, and which images and masks each step of a run sees."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from fastjepa.config import Config
from fastjepa.engine.build import build_masks, build_order, build_schedule
from fastjepa.masks import MultiBlockMasks

CLEAN = "clean"
TRAINED = ("jepa", "mae")
LEARNERS = ("pixels", "untrained", *TRAINED)
PROBE_AT = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # of a clean run
_WARMUP = 0.1  # of a run, at most


@dataclass(frozen=True)
class Condition:
    """The images of a run: clean, or with a kind of detail added."""

    kind: str = CLEAN
    strength: float = 0.0

    def __str__(self) -> str:
        return self.kind if self.kind == CLEAN else f"{self.kind}-{self.strength:g}"


@dataclass(frozen=True)
class Task:
    """One result: somebody who learns (or does not), some images, a seed."""

    learner: str
    condition: Condition
    seed: int

    def __str__(self) -> str:
        return f"{self.learner}_{self.condition}_seed{self.seed}"

    @property
    def probe_at(self) -> tuple[float, ...]:
        """After which parts of its training it is judged. At the start it is "untrained"."""
        return PROBE_AT if self.condition.kind == CLEAN and self.learner in TRAINED else (1.0,)


def conditions(kinds: Sequence[str], strengths: Sequence[float]) -> list[Condition]:
    """Clean images first, then strength by strength in the order given, all kinds of one before the next."""
    return [
        Condition(),
        *(Condition(kind, s) for s in dict.fromkeys(strengths) for kind in dict.fromkeys(kinds) if s),
    ]


def tasks(condition: Condition, seeds: Sequence[int]) -> list[Task]:
    return [Task(learner, condition, seed) for seed in dict.fromkeys(seeds) for learner in LEARNERS]


def config_of(config: Config, seed: int, steps: int, images: int) -> Config:
    """The configuration of one run: its seed and length, with a warm-up that fits into it."""
    epochs = steps * config.optim.global_batch / images
    warmup_epochs = min(config.optim.warmup_epochs, _WARMUP * epochs)
    optim = replace(config.optim, steps=steps, epochs=None, warmup_epochs=warmup_epochs)
    return replace(config, optim=optim, run=replace(config.run, seed=seed))


class Draw(NamedTuple):
    """Images and masks of consecutive steps. Patches have numbers below 256, so a byte each."""

    rows: np.ndarray[Any, Any]  # int32 [S, B], into the training images
    context: np.ndarray[Any, Any]  # uint8 [S, B, K]
    targets: np.ndarray[Any, Any]  # uint8 [S, M, B, P]


def epochs_of(config: Config, images: int) -> Iterator[tuple[int, int]]:
    """The first step of each epoch of a run and that after its last."""
    assert config.optim.steps is not None
    length = build_order(config, images).steps_per_epoch
    for first in range(0, config.optim.steps, length):
        yield first, min(first + length, config.optim.steps)


def draw(config: Config, images: int, steps: tuple[int, int]) -> Draw:
    """What steps first to last - 1, of one epoch, see: what the samplers draw for each of them.

    Places are a function of (seed, epoch, image) and sizes alone of the step, so steps with blocks of the
    same sizes are drawn in one call: nine calls for an epoch in place of 156.
    """
    order, sampler = build_order(config, images), build_masks(config)
    assert not isinstance(sampler, MultiBlockMasks) or sampler.mode == "budget", "shapes must not change"
    numbers = range(*steps)
    batches = [order.batch(step) for step in numbers]
    alike: dict[Any, list[int]] = defaultdict(list)
    for place, step in enumerate(numbers):
        alike[sampler.block_shapes(step) if isinstance(sampler, MultiBlockMasks) else None].append(place)
    context: list[torch.Tensor | None] = [None] * len(numbers)
    targets = list(context)
    for places in alike.values():
        chosen = torch.cat([batches[place][1] for place in places])
        masks = sampler.sample(chosen, epoch=batches[0][0], step=numbers[places[0]])
        for place, some, hidden in zip(
            places, masks.context.chunk(len(places)), masks.targets.chunk(len(places), dim=1), strict=True
        ):
            context[place], targets[place] = some, hidden

    def packed(parts: list[torch.Tensor | None], dtype: torch.dtype) -> np.ndarray[Any, Any]:
        return torch.stack([part for part in parts if part is not None]).to(dtype).numpy()

    rows = packed([batch for _, batch in batches], torch.int32)
    return Draw(rows, packed(context, torch.uint8), packed(targets, torch.uint8))


def rates(config: Config, images: int) -> torch.Tensor:
    """Learning rate, weight decay and momentum of every step: fp32 [3, S]."""
    assert config.optim.steps is not None
    schedule = build_schedule(config, build_order(config, images).steps_per_epoch)
    every = (schedule.at(step) for step in range(config.optim.steps))
    return torch.tensor([(now.lr, now.weight_decay, now.momentum) for now in every]).T.contiguous()

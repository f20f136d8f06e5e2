"""Learning rate, weight decay and momentum as pure functions of the optimizer step."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """What one optimizer step uses."""

    lr: float
    weight_decay: float
    momentum: float


@dataclass(frozen=True)
class Schedule:
    """The published schedules (arXiv:2301.08243, appendix A.1), over `steps` optimizer steps.

    Learning rate: linear from `start_lr` to `lr` over `warmup_steps`, then a cosine to `final_lr`.
    Weight decay: a cosine from `weight_decay` to `final_weight_decay`.
    Momentum of the target encoder: linear from `momentum` to `final_momentum`.
    """

    steps: int
    warmup_steps: int
    lr: float
    start_lr: float
    final_lr: float
    weight_decay: float
    final_weight_decay: float
    momentum: float
    final_momentum: float

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError("this is less than one optimizer step; raise optim.epochs, or give optim.steps")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(
                f"warm-up must fit into the run: {self.warmup_steps} of {self.steps} steps; "
                "lower optim.warmup_epochs or train for longer"
            )

    def at(self, step: int) -> Rates:
        """The rates of optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            lr = self.start_lr + (self.lr - self.start_lr) * (step + 1) / self.warmup_steps
        else:
            done = (step + 1 - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
            lr = cosine(self.lr, self.final_lr, done)
        done = (step + 1) / self.steps
        decay = cosine(self.weight_decay, self.final_weight_decay, done)
        momentum = self.momentum + (self.final_momentum - self.momentum) * step / self.steps
        return Rates(lr, decay, momentum)


def cosine(start: float, end: float, done: float) -> float:
    """Half a cosine wave from `start` (done = 0) to `end` (done = 1 and beyond)."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def is_due(every: int, heeded: int, step: int) -> bool:
    """Whether what is to be done at multiples of `every` (0: never) is due.

    Args:
        every: steps.
        heeded: the step up to which it was done.
        step: now.
    """
    return every > 0 and step // every > heeded // every

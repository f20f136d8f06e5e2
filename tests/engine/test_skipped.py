"""A step whose gradients are not finite, on whichever rank and in whichever micro-batch: nobody moves.

The worker processes run this file as a script: real gloo ranks under real DeepSpeed, and one without.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastjepa.config import Config, load_config
from fastjepa.data.fashion_mnist import FashionMNIST
from fastjepa.data.loader import Batch, make_loader
from fastjepa.data.order import GlobalOrder
from fastjepa.data.transforms import Augmentation
from fastjepa.engine.build import build_masks, build_model
from fastjepa.engine.learner import Learner, start_learner
from fastjepa.engine.processes.world import World, join_world, leave_world
from fastjepa.engine.schedules import Rates
from tests.ranks import run_ranks

RATES = Rates(lr=1e-3, weight_decay=0.05, momentum=0.9)


@dataclass(frozen=True)
class Case:
    stage: int
    precision: str
    accumulation: int = 1
    clip: float = 0.0
    objective: str = "jepa"
    offload: bool = False

    @property
    def name(self) -> str:
        return "-".join(f"{key}_{value}" for key, value in vars(self).items())


EVERY_ENGINE = [Case(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]
CASES = [
    *EVERY_ENGINE,
    *(Case(stage, "fp32", accumulation=2, clip=0.1) for stage in (0, 2, 3)),
    *(Case(stage, "bf16", accumulation=2) for stage in (1, 3)),
    Case(2, "fp32", accumulation=2, offload=True),
    Case(2, "bf16", offload=True),
    Case(0, "fp32", objective="mae"),
]


def config_of(case: Case) -> Config:
    return load_config(
        None,
        [
            "model.size=free", "model.width=32", "model.depth=1", "model.heads=2", "model.patch_size=4",
            "model.predictor_width=16", "model.predictor_depth=1", "model.predictor_heads=2",
            "model.decoder_width=16", "model.decoder_depth=1", "model.decoder_heads=2",
            "masks.context_tokens=10", "masks.min_keep=4", f"objective.name={case.objective}",
            "data.image_size=28", "data.channels=1", "data.mean=[0.286]", "data.std=[0.353]",
            "data.crop_scale=null", "optim.global_batch=16", "optim.epochs=null", "optim.steps=100",
            "optim.warmup_epochs=0.01", f"optim.clip_grad={case.clip}", f"optim.precision={case.precision}",
            f"speed.zero_stage={case.stage}", f"speed.accumulation={case.accumulation}", "speed.device=cpu",
            f"speed.offload_optimizer={str(case.offload).lower()}",
        ],
    )  # fmt: skip


class Stepper:
    """Steps a learner; on demand one gradient of one micro-batch on one rank is no number."""

    def __init__(self, case: Case, world: World) -> None:
        self.case, self.world = case, world
        config = config_of(case)
        self.learner: Learner = start_learner(build_model(config), config, world)
        batches: Iterator[Batch] = make_loader(
            FashionMNIST(), build_masks(config), GlobalOrder(10_000, 16, 0), size=28, seed=0,
            augmentation=Augmentation(), rank=world.rank, world_size=world.size,
            accumulation=case.accumulation,
        )  # fmt: skip
        self.steps = [[next(batches) for _ in range(case.accumulation)] for _ in range(5)]

    def __call__(self, number: int) -> None:
        self.learner.step(self.steps[number], RATES)

    def spoiled(self, number: int) -> None:
        seen = 0

        def spoil(gradient: Tensor) -> Tensor:
            nonlocal seen
            seen += 1
            is_bad = seen == 1 and self.world.rank == self.world.size - 1
            return torch.full_like(gradient, torch.nan) if is_bad else gradient

        trained = [p for p in self.learner.model.parameters() if p.requires_grad]
        hook = trained[len(trained) // 2].register_hook(spoil)
        try:
            self(number)
        finally:
            hook.remove()
        assert seen > 0, self.case

    def state(self) -> dict[str, Tensor]:
        """All that a step moves: by name on rank 0, and this rank's own parts of it, padding left out."""
        learner = self.learner
        gathered = learner.gather().items()
        state = {f"{kind}/{name}": tensor for kind, named in gathered for name, tensor in named.items()}
        state |= {f"weight/{n}": p for n, p in learner.model.named_parameters() if p.numel()}
        if learner.target is not None:
            state |= {f"shadow/{i}": part for i, part in enumerate(learner.target.shadow)}
            state |= {f"working/{i}": part for i, part in enumerate(learner.target.working)}
        return copy.deepcopy({name: tensor.detach() for name, tensor in state.items()})


def check(case: Case, world: World) -> None:
    """What comes after is to the bit what it is without the bad steps: nothing of them is left."""
    step = Stepper(case, world)
    step(0)
    before = step.state()
    step(3)
    step(4)
    expected = step.state()
    kinds = {name.partition("/")[0] for name in before if not torch.equal(expected[name], before[name])}
    assert kinds == {name.partition("/")[0] for name in before}, case

    step = Stepper(case, world)
    step(0)
    for skipped in (1, 2):
        step.spoiled(skipped)
        assert (step.learner.updates, step.learner.skipped_in_a_row) == (1, skipped), case
        assert differing(step.state(), before) == [], case
    step(3)
    step(4)
    assert (step.learner.updates, step.learner.skipped_in_a_row) == (3, 0), case
    assert differing(step.state(), expected) == [], case


def differing(state: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    assert state.keys() == expected.keys()
    return [name for name in expected if not torch.equal(state[name], expected[name])]


def run_worker() -> None:
    torch.set_num_threads(1)
    world = join_world("cpu")
    for case in CASES if world.size > 1 else EVERY_ENGINE:
        check(case, world)
        print(case.name, flush=True)
    leave_world()


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow_fault)])
def test_nothing_moves_on_any_rank(ranks: int) -> None:
    for output in run_ranks(ranks, __file__, timeout_s=300):
        assert all(case.name in output for case in EVERY_ENGINE)


if __name__ == "__main__":
    run_worker()

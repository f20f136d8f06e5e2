"""The memory of a step against what a real engine holds.

The worker processes run this file as a script: real gloo ranks under real DeepSpeed, on the CPU.
"""

import gc
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from fastjepa.config import Config, load_config
from fastjepa.data.loader import Batch
from fastjepa.engine.build import build_masks, build_model
from fastjepa.engine.launch import bucket_elements
from fastjepa.engine.learner import start_learner
from fastjepa.engine.processes.world import World, join_world, leave_world
from fastjepa.engine.schedules import Rates
from fastjepa.planning.memory import Memory, Split, memory_of
from fastjepa.planning.networks import network_of
from fastjepa.planning.tokens import Seen, Tokens
from fastjepa_kernels import block
from tests.ranks import run_ranks

IMAGES, PIXELS = 4, 160  # of a rank's step, and on a side
WIDTH = 192
Objective = Literal["jepa", "mae"]
BUCKET = bucket_elements(WIDTH)


@dataclass(frozen=True)
class Case:
    ranks: int
    stage: int
    remade: bool = False  # as on a GPU
    checkpointed: bool = False
    reuse: int = BUCKET
    accumulation: int = 1
    objective: Objective = "jepa"

    @property
    def name(self) -> str:
        return "-".join(f"{key}_{value}" for key, value in vars(self).items())

    @property
    def split(self) -> Split:
        return Split(self.stage, self.ranks, BUCKET, self.reuse, False, self.accumulation > 1)


CASES = [
    Case(1, 0),
    Case(1, 1, checkpointed=True),
    Case(1, 2),
    Case(1, 3),
    Case(2, 0, remade=True),
    Case(2, 1),
    Case(2, 2, remade=True, checkpointed=True),
    Case(2, 3, remade=True),
    Case(2, 3, reuse=1_000_000_000),  # DeepSpeed's own: all weights stay
    Case(1, 0, remade=True, accumulation=2),
    Case(2, 1, remade=True, accumulation=2),
    Case(2, 2, remade=True, accumulation=2),
    Case(1, 0, remade=True, objective="mae"),
    Case(2, 2, objective="mae"),
    Case(1, 0, checkpointed=True, objective="mae"),
    Case(2, 3, objective="mae"),
]


@dataclass(frozen=True)
class Held:
    """Bytes of rank 0, by its allocator and by its tensors.

    Attributes:
        state: of all tensors that live between steps.
        activations: made in the forward pass and alive when the backward pass begins.
        peak: the most in a step.
        seen: tokens of an image.
    """

    state: int
    activations: int
    peak: int
    seen: Seen


def config_of(case: Case) -> Config:
    key = "deepspeed.zero_optimization.stage3_max_reuse_distance"
    reuse = [f"{key}={case.reuse}"] if case.reuse != BUCKET else []
    # 6 million parameters, so that they are most of what there is; deeper than what ZeRO 3 may keep gathered.
    return load_config(
        None,
        [
            "model.size=free", f"model.width={WIDTH}", "model.depth=12", "model.heads=3",
            "model.patch_size=16", "model.predictor_width=96", "model.predictor_depth=4",
            "model.predictor_heads=3", "masks.mode=budget", f"data.image_size={PIXELS}",
            "model.decoder_width=96", "model.decoder_depth=4", "model.decoder_heads=3",
            f"objective.name={case.objective}", f"speed.accumulation={case.accumulation}",
            f"optim.global_batch={IMAGES * case.ranks * case.accumulation}", "optim.epochs=null",
            "optim.steps=10",
            "optim.precision=bf16", f"speed.zero_stage={case.stage}", "speed.device=cpu", "speed.workers=0",
            f"speed.checkpoint_blocks={str(case.checkpointed).lower()}", *reuse,
        ],
    )  # fmt: skip


def bytes_of_tensors() -> int:
    """Of the memory behind all that Python knows of and was made since `gc.freeze`, each once.

    What gloo's threads hold of their last message is no part of a run's state.
    """
    gc.collect()
    found = [each for each in gc.get_objects() if issubclass(type(each), Tensor) and not each.is_meta]
    found += [each.grad for each in found if each.is_leaf and each.grad is not None]
    return sum({s.data_ptr(): s.nbytes() for s in (each.untyped_storage() for each in found)}.values())


@contextmanager
def remaking(case: Case) -> Iterator[None]:
    """Blocks keep what they would keep on a GPU."""
    with mock.patch.object(block, "_or_remake", (lambda _: None) if case.remade else block._or_remake):
        yield


def mark(name: str) -> None:
    with record_function(f"mark {name}"):
        pass


def marking(backward: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    def marked(loss: Tensor) -> Any:
        mark("backward")
        return backward(loss)

    return marked


def allocated(run: profile) -> list[tuple[str, int, int]]:
    """Of each mark its name, the bytes allocated at it, and the most since the mark before."""
    assert run.profiler is not None
    assert run.profiler.kineto_results is not None
    events: Any = run.profiler.kineto_results.events()  # whose types do not know of memory
    changes = [(e.start_ns(), "", e.nbytes()) for e in events if e.name() == "[memory]"]
    marks = [(e.start_ns(), e.name(), 0) for e in events if e.name().startswith("mark ")]
    now = most = 0
    found = []
    for _, name, change in sorted(changes + marks):
        now += change
        most = max(most, now)
        if name:
            found.append((name.removeprefix("mark "), now, most))
            most = now
    return found


def hold(case: Case, world: World) -> Held:
    """Train a step, and then watch others.

    The profiler does not hear of what gloo's threads free, where by chance they are the last to hold it: it
    may say too much. The least of what several steps are said to hold is what they hold.
    """
    config = config_of(case)
    sampler = build_masks(config)
    index = torch.arange(IMAGES)
    pixels = torch.randint(256, (IMAGES, 3, PIXELS, PIXELS), dtype=torch.uint8)
    batch = Batch(pixels, index, sampler.sample(index), epoch=0, step=0, unreadable={})
    rates = Rates(lr=1e-4, weight_decay=0.05, momentum=0.996)
    gc.collect()
    gc.freeze()  # what there is, which is much: modules, and what is left of the cases before
    learner = start_learner(build_model(config), config, world)
    learner.step([batch] * case.accumulation, rates)
    between = bytes_of_tensors()
    engine: Any = learner.engine
    engine.backward = marking(engine.backward)
    activations, peaks = [], []
    for _ in range(1 if case.ranks == 1 else 6):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
            mark("begin")
            learner.step([batch] * case.accumulation, rates)
            mark("end")
        (_, begin, _), *marks = allocated(run)
        _, backward, _ = marks[-2]
        activations.append(backward - begin)
        peaks.append(max(most for _, _, most in marks) - begin)
    blocks, _, target = batch.masks.targets.shape
    asked = 0 if batch.masks.asked_rows is None else len(batch.masks.asked_rows)
    seen = Seen(batch.masks.context.shape[1], target, asked / IMAGES, blocks)
    return Held(between, min(activations), between + min(peaks), seen)


def run_worker(ranks: int, out: Path) -> None:
    torch.set_num_threads(1)
    world = join_world("cpu")
    for case in CASES:
        if case.ranks == ranks:
            with remaking(case):
                held = hold(case, world)
            if world.is_main:
                (out / f"{case.name}.json").write_text(json.dumps(asdict(held)))
    leave_world()


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Held]:
    out = tmp_path_factory.mktemp("held")
    for ranks in (1, 2):
        run_ranks(ranks, __file__, str(ranks), str(out), timeout_s=400)

    def of(case: Case) -> Held:
        content = json.loads((out / f"{case.name}.json").read_text())
        return Held(**content | {"seen": Seen(**content["seen"])})

    return of


STATE_WITHIN, WITHIN = 0.01, 0.05  # of what is held; positions and layouts are in no formula


def predicted(case: Case, seen: Seen) -> Memory:
    network = network_of(config_of(case))
    return memory_of(network, case.split, Tokens(IMAGES, seen), case.checkpointed, fused=case.remade)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_memory_is_that_of_a_real_run(held: Callable[[Case], Held], case: Case) -> None:
    found = held(case)
    memory = predicted(case, found.seen)
    kept = memory.activations + memory.step.gathered + memory.step.gradients * memory.step.is_carried
    ratios = memory.state.total / found.state, kept / found.activations, memory.peak / found.peak
    print(
        f"{case.name}: predicted over held: state {ratios[0]:.4f}, activations {ratios[1]:.4f}, "
        f"peak {ratios[2]:.4f}"
    )
    assert abs(ratios[0] - 1) < STATE_WITHIN, ratios
    assert abs(ratios[1] - 1) < WITHIN, ratios
    assert abs(ratios[2] - 1) < WITHIN, ratios


if __name__ == "__main__":
    run_worker(int(sys.argv[1]), Path(sys.argv[2]))

"""Whole training steps on one GPU: nothing waits, graphs change nothing, batches arrive as they are."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastjepa.data.loader import Batch
from fastjepa.engine.build import build_model
from fastjepa.engine.graphs import WARM_UP
from fastjepa.engine.learner import Learner, start_learner
from fastjepa.engine.prefetch import in_steps, on_device
from fastjepa.engine.processes.world import World, join_world, leave_world
from fastjepa.engine.single import SingleDevice
from tests.engine.test_agreement import Case, config_of, loader_of, named_weights, reference, update_error
from tests.engine.test_single import schedule_of

CUDA = torch.device("cuda")
MODES = ("none", "parts", "step")
SINGLE = Case(1, 0, 1)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    before = dict(os.environ)
    yield join_world("cuda")
    leave_world()
    os.environ.clear()
    os.environ.update(before)


def start(world: World, case: Case, **speed: Any) -> Learner:
    config = config_of(case)
    for key, value in ({"device": "cuda", "cuda_graph": "none"} | speed).items():
        setattr(config.speed, key, value)
    return start_learner(build_model(config), config, world)


def pinned(case: Case) -> Iterator[Batch]:
    return map(Batch.pin_memory, loader_of(config_of(case), accumulation=case.accumulation))


def train(
    world: World, case: Case, steps: int = 20, **speed: Any
) -> tuple[list[float], dict[str, Tensor], Learner]:
    """Losses and weights, named as the plain loop names them, on the CPU."""
    learner, schedule = start(world, case, **speed), schedule_of(config_of(case))
    batches = on_device(in_steps(pinned(case), case.accumulation), world.device)
    losses = [learner.step(next(batches), schedule.at(step))[0] for step in range(steps)]
    state = learner.gather()
    target = {"target_" + name: tensor for name, tensor in state.get("target", {}).items()}
    return torch.stack(losses).tolist(), state["student"] | target, learner


def assert_near(one: Any, other: Any, case: Case, loss: float, update: float) -> None:
    assert max(abs(a - b) / b for a, b in zip(one[0], other[0], strict=True)) < loss
    assert update_error(one[1], other[1], named_weights(build_model(config_of(case)))) < update


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_no_step_waits_for_the_device(world: World, mode: str, precision: str) -> None:
    case = Case(1, 0, 1, precision=precision)
    learner, schedule = start(world, case, cuda_graph=mode), schedule_of(config_of(case))
    batches = on_device(in_steps(list(pinned(case))[:16], 1), world.device)
    for step in range(WARM_UP + 3):  # compiled, captured, and replayed once
        learner.step(next(batches), schedule.at(step))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(WARM_UP + 3, WARM_UP + 9):
            learner.step(next(batches), schedule.at(step))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert learner.updates == WARM_UP + 9


def test_the_gpu_learns_what_the_plain_loop_does(world: World) -> None:
    losses, start, final = reference(SINGLE)
    found, weights, learner = train(world, SINGLE, steps=30)
    assert isinstance(learner.engine, SingleDevice)
    assert max(abs(a - b) / b for a, b in zip(found, losses, strict=True)) < 1e-4
    assert update_error(weights, final, start) < 2e-2


@pytest.mark.parametrize("mode", ["parts", "step"])
@pytest.mark.parametrize(
    ("precision", "loss", "update"), [("fp32", 1e-5, 1e-3), ("bf16", 5e-3, 5e-2)], ids=["fp32", "bf16"]
)
def test_graphs_change_nothing(world: World, mode: str, precision: str, loss: float, update: float) -> None:
    """20 steps, warm-up and capture among them: none is lost, none is done twice."""
    case = Case(1, 0, 1, precision=precision)
    eager, graphed = train(world, case), train(world, case, cuda_graph=mode)
    assert graphed[2].updates == eager[2].updates == 20
    assert_near(graphed, eager, case, loss, update)


@pytest.mark.parametrize("mode", ["truncate", "packed"])
def test_a_graph_for_each_of_few_shapes_changes_nothing(world: World, mode: str) -> None:
    case = Case(1, 0, 1, mode)
    graphed, eager = train(world, case, cuda_graph="step"), train(world, case)
    assert graphed[2].updates == 20
    assert_near(graphed, eager, case, 1e-5, 1e-3)
    step = graphed[2]._graphed_step
    assert step is not None
    assert sum(graph._graph is not None for graph in step._by_shape.values()) > 1


def test_a_graph_holds_the_average_that_follows_apart(world: World) -> None:
    graphed = train(world, SINGLE, cuda_graph="step", fused_update=False)
    assert_near(graphed, train(world, SINGLE), SINGLE, 1e-5, 1e-3)


def test_parts_serve_several_micro_batches(world: World) -> None:
    case = Case(1, 0, 2)
    assert_near(train(world, case, cuda_graph="parts"), train(world, case), case, 1e-5, 1e-3)


def test_a_graph_of_mae(world: World) -> None:
    case = Case(1, 0, 1, objective="mae")
    assert_near(train(world, case, cuda_graph="step"), train(world, case), case, 1e-5, 1e-3)


def test_clipping_is_done_on_the_device(world: World) -> None:
    case = Case(1, 0, 1, clip=0.05)
    graphed = train(world, case, cuda_graph="step")
    assert_near(graphed, train(world, case), case, 1e-5, 1e-3)
    assert float(graphed[2].grad_norm) > 0.05, "nothing was clipped"


def test_evaluation_runs_between_replays(world: World) -> None:
    case = Case(1, 0, 1)
    whole = train(world, case, steps=12)
    learner, schedule = start(world, case, cuda_graph="parts"), schedule_of(config_of(case))
    batches = on_device(in_steps(pinned(case), 1), world.device)
    losses = []
    for step in range(12):
        (batch,) = next(batches)
        losses.append(float(learner.step([batch], schedule.at(step))[0]))
        with torch.no_grad():  # all patches of fewer images
            learner.encoders().judged(batch.images[:3])
            learner.model.encoder(batch.images[:3])
    assert max(abs(a - b) / b for a, b in zip(losses, whole[0], strict=True)) < 1e-5


def test_a_skipped_step_is_heard_of_late_and_moves_nothing(world: World) -> None:
    learner, schedule = start(world, SINGLE), schedule_of(config_of(SINGLE))
    batches = on_device(in_steps(pinned(SINGLE), 1), world.device)
    parameter = next(learner.engine.module.parameters())
    heard = []
    for step in range(8):
        if step in (2, 3):
            spoil = parameter.register_hook(lambda gradient: gradient * torch.inf)
            before = learner.gather()
        learner.step(next(batches), schedule.at(step))
        if step in (2, 3):
            spoil.remove()
            assert learner.updates == 2
            for kind, tensors in learner.gather().items():
                for name, tensor in tensors.items():
                    assert torch.equal(tensor, before[kind][name]), (kind, name)
        heard.append(learner.skipped_in_a_row)
    lag = learner.lag
    assert heard == [0] * (2 + lag) + [1, 2] + [0] * (4 - lag)
    assert learner.updates == 6


def test_batches_arrive_as_they_are(world: World) -> None:
    host = [batch for batch, _ in zip(pinned(SINGLE), range(12), strict=False)]
    images, masks = [], []
    for (batch,) in on_device(in_steps(host, 1), world.device):
        torch.cuda._sleep(2_000_000)  # so that copies of the next would get in the way
        images.append(batch.images + 0)
        masks.append([tensor + 0 for tensor in vars(batch.masks).values() if tensor is not None])
        del batch
    for one, pixels, fields in zip(host, images, masks, strict=True):
        assert torch.equal(one.images, pixels.cpu())
        given = [tensor for tensor in vars(one.masks).values() if tensor is not None]
        assert all(torch.equal(a, b.cpu()) for a, b in zip(given, fields, strict=True))


def test_rates_wait_for_no_step_and_none_is_lost(world: World) -> None:
    """Far ahead of the device, each step still gets the rates that were meant for it."""
    engine = start(world, SINGLE).engine
    assert isinstance(engine, SingleDevice)
    schedule, seen = schedule_of(config_of(SINGLE)), []
    for step in range(30):
        torch.cuda._sleep(1_000_000)
        engine.set_rates(schedule.at(step))
        seen.append(engine.hyper[:3].clone())
    for step, values in enumerate(seen):
        rates = schedule.at(step)
        assert values.tolist() == [rates.lr, rates.weight_decay, rates.momentum]

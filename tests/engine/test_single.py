"""One device without DeepSpeed: what is learned, what is skipped, what is resumed, and that nothing waits."""

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastjepa_kernels as fk
from fastjepa.config import Config, ConfigError
from fastjepa.engine.build import build_model, build_schedule
from fastjepa.engine.launch import preferred_kernels
from fastjepa.engine.learner import Learner, start_learner
from fastjepa.engine.processes.world import World, join_world, leave_world
from fastjepa.engine.single import ALIGNED, SingleDevice
from fastjepa.engine.speed import check_speed
from fastjepa.objectives import JEPA
from tests.engine.test_agreement import (
    IMAGES,
    STEPS,
    Case,
    config_of,
    loader_of,
    named_weights,
    reference,
    update_error,
)

if TYPE_CHECKING:
    from tests.conftest import Trainer


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[World]:
    before = dict(os.environ)
    yield join_world("cpu")
    leave_world()
    os.environ.clear()
    os.environ.update(before)


@dataclass(frozen=True)
class Trained:
    learner: Learner
    losses: list[float]
    state: dict[str, dict[str, Tensor]]
    shadow_error: float

    @property
    def weights(self) -> dict[str, Tensor]:
        """Named as the plain loop names them."""
        target = {"target_" + name: tensor for name, tensor in self.state.get("target", {}).items()}
        return self.state["student"] | target


def train(
    world: World, case: Case, *, first: int = 0, last: int = STEPS, start: dict[str, Any] | None = None,
    **speed: Any,
) -> Trained:  # fmt: skip
    """Steps `first` to `last`, from the state of another learner if there is one."""
    config = config_of(case)
    for key, value in speed.items():
        setattr(config.speed, key, value)
    learner = start_learner(build_model(config), config, world)
    if start is not None:
        learner.load(start["student"], start.get("target"), start, updates=first)
    schedule, batches = schedule_of(config), loader_of(config, accumulation=case.accumulation)
    losses, worst = [], 0.0
    for step in range(last):
        micro_batches = [next(batches) for _ in range(case.accumulation)]
        if step < first:
            continue
        target, rates = learner.target, schedule.at(step)
        before = [] if target is None else [shadow.clone() for shadow in target.shadow]
        losses.append(float(learner.step(micro_batches, rates)[0]))
        if target is not None:
            for partition, old, new in zip(target.partitions, before, target.shadow, strict=True):
                expected = torch.lerp(old, partition.master, 1 - rates.momentum)
                worst = max(worst, float((new - expected).abs().max()))
    return Trained(learner, losses, copy.deepcopy(learner.gather()), worst)


def schedule_of(config: Config) -> Any:
    return build_schedule(config, IMAGES // config.optim.global_batch)


def assert_near(one: Trained, other: Trained, start: dict[str, Tensor]) -> None:
    for a, b in zip(one.losses, other.losses, strict=True):
        assert abs(a - b) < 1e-5 * b
    assert update_error(one.weights, other.weights, start) < 1e-3


def assert_same(one: Trained, other: Trained) -> None:
    assert one.losses == other.losses
    for kind, tensors in one.state.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, other.state[kind][name]), (kind, name)


FP32 = [
    Case(1, 0, 1),
    Case(1, 0, 4),
    Case(1, 0, 1, "packed"),
    Case(1, 0, 4, "packed"),
    Case(1, 0, 1, clip=0.05),
    Case(1, 0, 4, clip=0.05),
    Case(1, 0, 1, objective="mae"),
    Case(1, 0, 4, objective="mae"),
]


@pytest.mark.parametrize("case", FP32, ids=lambda case: case.name)
def test_fp32_agrees_with_plain_torch(world: World, case: Case) -> None:
    """Measured: losses within 2.2e-7, updates within 5.4e-6."""
    trained = train(world, case)
    assert isinstance(trained.learner.engine, SingleDevice)
    losses, start, final = reference(case)
    assert max(abs(a - b) / b for a, b in zip(trained.losses, losses, strict=True)) < 1e-5
    assert update_error(trained.weights, final, start) < 1e-3
    assert trained.shadow_error == 0.0
    assert trained.learner.updates == STEPS
    if isinstance(trained.learner.model, JEPA):
        working = trained.learner.model.target_encoder.named_parameters()
        assert all(
            torch.equal(tensor, trained.state["target"]["encoder." + name]) for name, tensor in working
        )


@pytest.mark.parametrize("accumulation", [1, 4])
def test_bf16_follows_fp32(world: World, accumulation: int) -> None:
    """The bounds of the other stages; measured: .0013 and .011."""
    case = Case(1, 0, accumulation, precision="bf16")
    trained = train(world, case)
    losses, start, final = reference(case)
    assert max(abs(a - b) / b for a, b in zip(trained.losses, losses, strict=True)) < 5e-3
    assert update_error(trained.weights, final, start) < 5e-2
    assert trained.shadow_error == 0.0
    assert isinstance(trained.learner.model, JEPA)
    for name, tensor in trained.learner.model.target_encoder.named_parameters():
        assert torch.equal(tensor, trained.state["target"]["encoder." + name].bfloat16())
    for name, tensor in trained.learner.model.trainable().named_parameters():
        assert torch.equal(tensor, trained.state["student"][name].bfloat16())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_average_may_follow_in_the_same_launch_or_apart(world: World, precision: str) -> None:
    case = Case(1, 0, 1, precision=precision)
    assert_same(
        train(world, case, last=10, fused_update=True), train(world, case, last=10, fused_update=False)
    )


def test_a_checkpoint_goes_to_deepspeed_and_back(world: World) -> None:
    """10 steps alone, 10 under ZeRO 1 and 10 alone are 30 steps alone; and so are 30 under ZeRO 1."""
    alone, zero = Case(1, 0, 1), Case(1, 1, 1)
    whole = train(world, alone, last=30)
    part = train(world, alone, last=10)
    for case, first in ((zero, 10), (alone, 20)):
        part = train(world, case, first=first, last=first + 10, start=part.state)
        assert isinstance(part.learner.engine, SingleDevice) == (case is alone)
        assert part.learner.updates == first + 10
    start = named_weights(build_model(config_of(alone)))
    assert update_error(part.weights, whole.weights, start) < 1e-4
    assert_near(train(world, zero, last=30), whole, start)


def test_it_resumes_to_the_bit(world: World) -> None:
    case = Case(1, 0, 1, precision="bf16")
    whole, half = train(world, case, last=12), train(world, case, last=6)
    rest = train(world, case, first=6, last=12, start=half.state)
    assert half.losses + rest.losses == whole.losses
    for name, tensor in whole.weights.items():
        assert torch.equal(tensor, rest.weights[name]), name


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("case", [Case(1, 0, 1), Case(1, 0, 4, precision="bf16")], ids=lambda case: case.name)
def test_a_step_without_finite_gradients_moves_nothing(world: World, case: Case, fused: bool) -> None:
    learner = train(world, case, last=2, fused_update=fused).learner
    batches = loader_of(config_of(case), accumulation=case.accumulation)
    rates = schedule_of(config_of(case)).at(2)

    def step() -> None:
        learner.step([next(batches) for _ in range(case.accumulation)], rates)

    parameter = next(learner.engine.module.parameters())
    spoil = parameter.register_hook(lambda gradient: gradient * torch.inf)
    before = copy.deepcopy(learner.gather())
    working = named_weights(learner.model)
    for skipped in (1, 2):
        step()
        assert (learner.updates, learner.skipped_in_a_row) == (2, skipped)
    spoil.remove()
    for kind, tensors in learner.gather().items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, before[kind][name]), (kind, name)
    for name, tensor in learner.model.named_parameters():
        assert torch.equal(tensor, working[name]), name
    step()
    assert (learner.updates, learner.skipped_in_a_row) == (3, 0)


def test_kernels_are_chosen_for_the_whole_run(world: World) -> None:
    case = Case(1, 0, 1)
    config = config_of(case)
    config.speed.kernels = "torch"
    with preferred_kernels(config):
        assert fk.choice.preference() == "torch"
        plain = train(world, case, last=20)
    config.speed.kernels = "auto"
    assert isinstance(preferred_kernels(config), nullcontext)
    assert_near(plain, train(world, case, last=20), named_weights(build_model(config)))


def test_parameters_lie_aligned_in_flat_groups(world: World) -> None:
    engine = start_learner(build_model(config_of(FP32[0])), config_of(FP32[0]), world).engine
    assert isinstance(engine, SingleDevice)
    assert [group.decayed for group in engine.groups] == [True, False, True, False]
    for group in engine.groups:
        assert group.weight is group.master, "in fp32 the weights need no copy"
        assert group.master.numel() % ALIGNED == 0
        for slot in group.slots:
            assert slot.offset % ALIGNED == 0
            assert slot.parameter.data_ptr() == slot.view(group.weight).data_ptr()


class Calls(TorchDispatchMode):
    """Name and shapes of the result of every op."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[torch.Size, ...]]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        del types
        out = function(*arguments, **(keywords or {}))
        shapes = tuple(leaf.shape for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        self.seen.append((str(function), shapes))
        return out


WAITS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "is_nonzero", "equal.default")


@pytest.mark.parametrize("case", [Case(1, 0, 1), Case(1, 0, 2, precision="bf16")], ids=lambda case: case.name)
def test_a_step_asks_nothing_of_the_device(world: World, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each of these would wait; and in `budget` all steps do the same on the same shapes."""
    # Values of indices are looked at on the CPU alone.
    monkeypatch.setattr("fastjepa_kernels.checks.values_are_checked", lambda tensor: False)
    config = config_of(case)
    learner = start_learner(build_model(config), config, world)
    schedule, batches = schedule_of(config), loader_of(config, accumulation=case.accumulation)
    steps = []
    for step in range(6):
        micro_batches = [next(batches) for _ in range(case.accumulation)]
        with Calls() as calls:
            learner.step(micro_batches, schedule.at(step))
        steps.append(calls.seen)
    waiting = {name for name, _ in steps[0] if any(word in name.split(".", 1)[-1] for word in WAITS)}
    assert not waiting
    assert any("adamw_ema_" in name for name, _ in steps[0])
    for seen in steps[2:]:  # caches are filled
        assert seen == steps[1]


def test_what_one_device_cannot_do_is_refused(world: World) -> None:
    config = config_of(FP32[0])
    config.deepspeed = {"wall_clock_breakdown": True}
    with pytest.raises(ConfigError, match="the deepspeed section would do nothing"):
        check_speed(config, world)
    config.deepspeed = {}
    config.speed.kernels = "cuda"
    with pytest.raises(ConfigError, match=r"speed.kernels cuda: no op .* there are .*torch"):
        check_speed(config, world)
    config.speed.kernels, config.speed.cuda_graph = "auto", "step"
    with pytest.raises(ConfigError, match="cuda_graph step needs a GPU, and this trains on the CPU"):
        start_learner(build_model(config), config, world)


def test_the_command_resumes_under_another_stage(
    trainer_at: "Callable[[Path], Trainer]", tmp_path: Path
) -> None:
    trainer = trainer_at(tmp_path)
    trainer("speed.zero_stage=0").check()
    assert trainer.saved_steps == [5, 10]
    last = trainer.run / "checkpoints" / "step_00000010"
    alone = load_file(last / "student.safetensors"), load_file(last / "target.safetensors")
    shutil.rmtree(last)
    assert "Resuming at step 5 of 10" in trainer("speed.zero_stage=1").check().out
    for one, name in zip(alone, ("student", "target"), strict=True):
        zero = load_file(last / f"{name}.safetensors")
        for key, tensor in one.items():
            if not key.endswith("attn.qkv.bias"):  # of the key's third, Adam makes steps out of rounding
                torch.testing.assert_close(tensor, zero[key], rtol=1e-3, atol=1e-5)


def test_the_command_stops_when_gradients_stay_infinite(
    trainer_at: "Callable[[Path], Trainer]", tmp_path: Path
) -> None:
    failed = trainer_at(tmp_path)("speed.zero_stage=0", "optim.lr=1e30", "optim.start_lr=1e30").check(1)
    assert failed.out.count("the gradients are not finite; the weights stay as they were") == 3
    assert len(failed.errors) == 1
    assert "not finite" in failed.errors[0]


WITHOUT_DEEPSPEED = """
import sys
sys.modules["deepspeed"] = None  # then an import of it fails
import torch
import fastjepa.engine.learner, fastjepa.train
from fastjepa.config import ConfigError
from fastjepa.engine.folder import versions
from fastjepa.engine.processes.world import join_world, leave_world
from fastjepa.engine.learner import start_learner
from tests.engine.test_agreement import Case, build_model, build_schedule, config_of, loader_of
world = join_world("cpu")
config = config_of(Case(1, 0, 1))
learner = start_learner(build_model(config), config, world)
learner.step([next(loader_of(config))], build_schedule(config, 625).at(0))
assert learner.updates == 1 and "torch" in versions()
try:
    start_learner(build_model(config), config_of(Case(1, 1, 1)), world)
except ConfigError as error:
    print(error)
leave_world()
"""


def test_one_device_needs_no_deepspeed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DEEPSPEED],
        env={
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("RANK", "WORLD_SIZE", "MASTER_"))
        }
        | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "one device needs none at speed.zero_stage 0" in done.stdout

"""A loss spike that images make: gone back from once, with the data that made it left out, and exactly so."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from fastjepa.config import load_config
from fastjepa.data.loader import make_loader
from fastjepa.data.order import GlobalOrder
from fastjepa.engine.build import build_augmentation, build_masks, build_model, build_order, build_schedule
from fastjepa.engine.checkpoints.checkpoint import checkpoint_path
from fastjepa.engine.images import open_images
from fastjepa.engine.learner import start_learner
from fastjepa.engine.prefetch import in_steps
from fastjepa.engine.processes.world import World, join_world, leave_world
from tests.faults.evidence import results

if TYPE_CHECKING:
    from tests.conftest import Trainer

STEPS, BATCH, IMAGES = 120, 16, 16 * 140  # one epoch: every image comes once
NOISE = (range(80, 85), range(100, 106))  # batches of noise, all others are of smooth images
BACK, SEEN = 70, 85  # where the run goes back to, from the log line that shows the first spike


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    before = dict(os.environ)
    yield join_world("cpu")
    leave_world()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Of a run on a folder of images; MAE on pixels, for it finds noise as hard as it is."""
    root = tmp_path_factory.mktemp("images")
    order, dice = GlobalOrder(IMAGES, BATCH, seed=0), np.random.default_rng(0)
    noisy = {int(i) for batches in NOISE for batch in batches for i in order.batch(batch)[1]}
    ramp = np.linspace(0, 60, 28)
    for i in range(IMAGES):
        smooth = 90 + ramp[:, None] + dice.uniform(-0.5, 0.5) * ramp[None, :]
        pixels = dice.integers(0, 256, (28, 28)) if i in noisy else smooth
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"{i:05d}.png")
    return (
        "data.name=folder", f"data.root={root}", "data.hold_out=0", "objective.name=mae",
        "objective.norm_pix_loss=false", "model.decoder_width=16", "model.decoder_depth=1",
        "model.decoder_heads=2", "optim.warmup_epochs=0.1", f"optim.steps={STEPS}",
        "run.on_spike=rollback", "run.log_every=5", "run.save_every=10",
    )  # fmt: skip


@pytest.fixture(scope="module")
def healed(
    settings: tuple[str, ...],
    trainer_at: "Callable[[Path], Trainer]",
    tmp_path_factory: pytest.TempPathFactory,
) -> "tuple[Trainer, str]":
    trainer = trainer_at(tmp_path_factory.mktemp("healed"))
    return trainer, trainer(*settings).check().out


def student(run: Path) -> dict[str, Tensor]:
    return load_file(checkpoint_path(run / "checkpoints", STEPS) / "student.safetensors")


def events(rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(row["event"], row["step"]) for row in rows if "event" in row]


def test_goes_back_once_and_says_so(healed: "tuple[Trainer, str]") -> None:
    trainer, out = healed
    rolled_back, second = (row for row in trainer.rows if "event" in row)
    assert (rolled_back["event"], rolled_back["step"]) == ("rollback", BACK)
    assert rolled_back["spike_step"] == NOISE[0].start + 1
    assert rolled_back["passed_over"] == SEEN - BACK
    assert rolled_back["spike_loss"] > 3 * rolled_back["usual_loss"]
    at = NOISE[0].start + 1
    assert f"at step {at}: going back to step {BACK}, and on without the data of {SEEN - BACK} steps" in out

    # The other noise comes so much sooner now, and too soon to go back again.
    sooner = NOISE[1].start + 1 - (SEEN - BACK)
    assert (second["event"], second["spike_step"]) == ("spike", sooner)
    assert out.count("warning: the loss rose") == 2
    assert f"at step {sooner}, so soon after the one at step {NOISE[0].start + 1}" in out

    steps = [row["step"] for row in trainer.rows]
    assert steps == sorted(set(steps))
    losses = {row["step"]: row["loss"] for row in trainer.rows}
    assert max(loss for step, loss in losses.items() if BACK < step <= sooner) < 2 * rolled_back["usual_loss"]


def test_what_follows_is_the_step_with_the_data_of_a_later_batch(
    healed: "tuple[Trainer, str]", settings: tuple[str, ...], world: World
) -> None:
    """Written out as a loop: step s takes batch s, and from step 70 on batch s + 15."""
    trainer, _ = healed
    config = load_config(trainer.write_config(), settings)
    order = build_order(config, IMAGES)
    schedule, learner = build_schedule(config, order.steps_per_epoch), start_learner(
        build_model(config), config, world
    )  # fmt: skip
    images = open_images(config).train
    batches = make_loader(
        images, build_masks(config), order, size=28, augmentation=build_augmentation(config), seed=0
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the command was given; sums of more are others
    try:
        step = 0
        for batch, micro_batches in enumerate(in_steps(batches, 1)):
            if step < STEPS and not BACK <= batch < SEEN:
                learner.step(micro_batches, schedule.at(step))
                step += 1
            if step == STEPS:
                break
    finally:
        torch.set_num_threads(threads)
    final = student(trainer.run)
    expected = learner.gather()["student"]
    assert final.keys() == expected.keys()
    assert [name for name in final if not torch.equal(final[name], expected[name])] == []


def test_killed_after_going_back_it_ends_the_same(
    healed: "tuple[Trainer, str]", settings: tuple[str, ...], train: "Trainer"
) -> None:
    process = train.start(*settings)
    deadline_s = time.monotonic() + 120
    while not events(train.rows) and process.poll() is None:
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert train.finish(process).code == -signal.SIGKILL
    assert events(train.rows) == [("rollback", BACK)]
    train(*settings).check()
    assert results(train) == results(healed[0])
    final, expected = student(train.run), student(healed[0].run)
    assert [name for name in expected if not torch.equal(final[name], expected[name])] == []


@pytest.mark.slow_fault
def test_two_ranks_under_zero_go_back_together(
    healed: "tuple[Trainer, str]", settings: tuple[str, ...], train: "Trainer"
) -> None:
    ranks = ("torchrun", "--standalone", "--nproc-per-node", "2")
    train(*settings, "speed.zero_stage=2", launcher=ranks).check()
    assert events(train.rows) == events(healed[0].rows)
    losses, expected = ({row["step"]: row["loss"] for row in run.rows} for run in (train, healed[0]))
    assert losses == pytest.approx(expected, rel=1e-2)
    state = json.loads((checkpoint_path(train.run / "checkpoints", STEPS) / "state.json").read_text())
    assert state["position"]["passed_over"] == SEEN - BACK
    assert state["position"]["rolled_back"] == NOISE[0].start + 1

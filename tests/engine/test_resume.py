"""A run that is stopped, however it is stopped, ends as it would have without."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from fastjepa.engine.checkpoint import checkpoint_path

if TYPE_CHECKING:
    from tests.conftest import Trainer

STEPS = 140  # eight epochs and a bit
# Log lines do not fall on checkpoints: what a line averages must survive a stop too.
RUN = (
    f"optim.steps={STEPS}",
    "run.log_every=4",
    "run.save_every=13",
    "probe.every_steps=65",
    "data.flip=0.5",
)
SPEEDS = {"images_per_second", "data_wait_fraction", "elapsed_s"}


@pytest.fixture(scope="module")
def uninterrupted(
    trainer_at: "Callable[[Path], Trainer]", tmp_path_factory: pytest.TempPathFactory
) -> "Trainer":
    trainer = trainer_at(tmp_path_factory.mktemp("uninterrupted"))
    trainer(*RUN).check()
    return trainer


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by file and name."""
    folder = checkpoint_path(run / "checkpoints", step)
    return {
        f"{file.stem}/{name}": tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def results(trainer: "Trainer") -> list[dict[str, Any]]:
    """The rows of metrics, without what only says how fast they came."""
    return [{key: row[key] for key in row.keys() - SPEEDS} for row in trainer.rows]


def assert_same_run(trainer: "Trainer", reference: "Trainer") -> None:
    final, expected = tensors(trainer.run, STEPS), tensors(reference.run, STEPS)
    assert {name.partition("/")[0] for name in final} == {"student", "target", "exp_avg", "exp_avg_sq"}
    assert final.keys() == expected.keys()
    assert [name for name in final if not torch.equal(final[name], expected[name])] == []
    assert results(trainer) == results(reference)


def test_same_bits_after_kill_sigterm_and_ctrl_c(train: "Trainer", uninterrupted: "Trainer") -> None:
    # Before the first checkpoint: it starts over.
    process = train.start(*RUN)
    train.wait_for(process, step=8)
    process.send_signal(signal.SIGKILL)
    assert train.finish(process).code == -signal.SIGKILL
    shutil.rmtree(train.run / "checkpoints", ignore_errors=True)  # in case one was just written
    with (train.run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')  # as a killed process leaves it

    process = train.start(*RUN)
    train.wait_for(process, step=16)
    process.send_signal(signal.SIGKILL)
    assert train.finish(process).code == -signal.SIGKILL
    assert 13 <= train.saved_steps[-1] < STEPS

    process = train.start(*RUN, "speed.workers=2")
    train.wait_for(process, step=40)
    process.send_signal(signal.SIGTERM)
    stopped = train.finish(process).check()
    step = train.saved_steps[-1]
    assert f"Stopped at step {step} of {STEPS}; the same command resumes." in stopped.out
    assert 40 <= step < STEPS

    process = train.start(*RUN)
    train.wait_for(process, step=min(step + 4, STEPS - 8))
    process.send_signal(signal.SIGINT)
    interrupted = train.finish(process).check(130)
    step = train.saved_steps[-1]
    assert f"Stopped at step {step} of {STEPS}" in interrupted.out

    resumed = train(*RUN).check()
    assert f"Resuming at step {step} of {STEPS}" in resumed.out
    assert_same_run(train, uninterrupted)


def test_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    train: "Trainer", uninterrupted: "Trainer"
) -> None:
    shutil.copytree(uninterrupted.run, train.run)
    assert train.saved_steps == [130, 140]
    damaged = checkpoint_path(train.run / "checkpoints", STEPS) / "target.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)

    # And killed between saving and judging: the verdict of step 130 is still to come.
    metrics = train.run / "metrics.jsonl"
    metrics.write_text("".join(f"{json.dumps(row)}\n" for row in train.rows if row["step"] < 130))

    resumed = train(*RUN).check()
    assert f"warning: {damaged} is damaged" in resumed.out
    assert "Resuming at step 130 of 140" in resumed.out
    assert_same_run(train, uninterrupted)


def test_no_good_checkpoint_is_an_error(train: "Trainer", uninterrupted: "Trainer") -> None:
    shutil.copytree(uninterrupted.run, train.run)
    for step in train.saved_steps:
        (checkpoint_path(train.run / "checkpoints", step) / "manifest.json").unlink()
    before = sorted(train.run.rglob("*"))
    failed = train(*RUN).check(1)
    assert len(failed.errors) == 1
    assert "no checkpoint in" in failed.err
    assert failed.err.count("is incomplete") == 2
    assert sorted(train.run.rglob("*")) == before


def test_two_ranks_stop_together_and_one_goes_on_alone(train: "Trainer", uninterrupted: "Trainer") -> None:
    process = train.start(*RUN, launcher=("torchrun", "--standalone", "--nproc-per-node", "2"))
    train.wait_for(process, step=20)
    process.send_signal(signal.SIGTERM)  # torchrun hands it to both, and then fails of it itself
    stopped = train.finish(process)
    step = train.saved_steps[-1]
    assert stopped.out.count(f"Stopped at step {step} of {STEPS}; the same command resumes.") == 1
    assert 20 <= step < STEPS

    resumed = train(*RUN, "speed.zero_stage=2").check()
    assert f"Resuming at step {step} of {STEPS}" in resumed.out
    # The same images and masks in the same order; sums were taken in another order for a while.
    losses, expected_losses = (
        {row["step"]: row["loss"] for row in results(run) if "loss" in row} for run in (train, uninterrupted)
    )
    assert losses == pytest.approx(expected_losses, rel=1e-3)
    final, expected_final = tensors(train.run, STEPS), tensors(uninterrupted.run, STEPS)
    assert final.keys() == expected_final.keys()
    for name in final:
        if not name.endswith("attn.qkv.bias"):  # of the key's third, Adam makes steps out of rounding
            torch.testing.assert_close(final[name], expected_final[name], rtol=1e-2, atol=1e-4)

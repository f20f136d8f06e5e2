"""Damaged checkpoints: each file is named, and the newest checkpoint without damage is taken."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fastjepa.engine.checkpoints.checkpoint import checkpoint_path, list_checkpoints
from tests.faults.evidence import Watched, lines_with, results
from tests.faults.table import Row

# As many checkpoints as there are ways to damage one.
# Verdicts fall on no log line, so that a missing one is a row of its own.
RUN = (
    "optim.steps=30",
    "run.log_every=5",
    "run.save_every=1",
    "run.keep_last=40",
    "probe.every_steps=6",
    "data.flip=0.5",
)
WAYS = ("truncated", "one bit flipped", "deleted")


def take_over(run: Watched, into: Watched) -> None:
    """Go on where a run has ended, in a copy."""
    shutil.copytree(run.trainer.run, into.trainer.run)
    shutil.copytree(run.witness.folder, into.witness.folder)
    into.witness.starts = run.witness.starts


def damage(file: Path, way: str, chance: random.Random) -> None:
    content = bytearray(file.read_bytes())
    match way:
        case "truncated":
            file.write_bytes(content[: chance.randrange(len(content))])
        case "one bit flipped":
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            file.write_bytes(content)
        case "deleted":
            file.unlink()


@pytest.mark.slow_fault
def test_every_file_in_turn(
    watched: Watched,
    uninterrupted: Callable[..., Watched],
    table: Callable[[str, str], Row],
    chance: random.Random,
) -> None:
    reference = uninterrupted(*RUN)
    take_over(reference, watched)
    checkpoints = list_checkpoints(watched.checkpoints)  # newest first
    names = sorted(file.name for file in checkpoints[0].iterdir())
    assert len(names) >= 6
    cases = [(name, way) for name in names for way in WAYS]
    rows = {way: table(f"a checkpoint file is {way}", "it is named, the one before taken") for way in WAYS}
    damaged = []
    for (name, way), checkpoint in zip(cases, checkpoints, strict=False):
        damage(checkpoint / name, way, chance)
        # A changed hash in the manifest looks like a change of the file that it is of.
        is_vague = (name, way) == ("manifest.json", "one bit flipped")
        damaged.append(checkpoint if is_vague else checkpoint / name)
        rows[way].times += 1
    assert len(damaged) == len(cases), "there are too few checkpoints"

    good = checkpoints[len(cases)]
    step = int(good.name[5:])
    # And as if it had been killed between saving and judging: the verdict is still to come.
    assert step % 6 == 0
    metrics = watched.trainer.run / "metrics.jsonl"
    rows_before = [row for row in watched.trainer.rows if row["step"] < step]
    metrics.write_text("".join(f"{json.dumps(row)}\n" for row in rows_before))

    resumed = watched(*RUN).check()
    assert [file for file in damaged if not lines_with(resumed.out, "warning:", str(file))] == []
    assert lines_with(resumed.out, f"Resuming at step {step} of 30", str(good))
    for row in rows.values():
        row.hold_against(watched, reference)
    assert results(watched.trainer) == results(reference.trainer)


def test_none_is_good(
    watched: Watched, uninterrupted: Callable[..., Watched], table: Callable[[str, str], Row]
) -> None:
    """Nothing is deleted, and no run starts over, without being asked to."""
    row = table("every checkpoint is damaged", "refused; each file is named, nothing is touched")
    take_over(uninterrupted(*RUN), watched)
    checkpoints = list_checkpoints(watched.checkpoints)
    for checkpoint in checkpoints[2:]:
        shutil.rmtree(checkpoint)
    for checkpoint in checkpoints[:2]:
        (checkpoint / "manifest.json").unlink()
        row.times += 1
    before = sorted(watched.trainer.run.rglob("*"))
    failed = watched(*RUN).check(1)
    assert len(failed.errors) == 1
    assert "no checkpoint in" in failed.errors[0]
    for checkpoint in checkpoints[:2]:
        assert str(checkpoint / "manifest.json") in failed.err
    assert sorted(watched.trainer.run.rglob("*")) == before


@pytest.mark.slow_fault
def test_half_a_checkpoint_of_another_process_is_cleared_away(
    watched: Watched, uninterrupted: Callable[..., Watched], table: Callable[[str, str], Row]
) -> None:
    row = table("leftovers in the folder of checkpoints", "ignored; those of a save are cleared away")
    reference = uninterrupted(*RUN)
    take_over(reference, watched)
    shutil.rmtree(checkpoint_path(watched.checkpoints, 30))
    for name in ("step_00000030.tmp", "step_00000099.tmp", "step_", "step_x", "lost+found"):
        (watched.checkpoints / name).mkdir()
        (watched.checkpoints / name / "student.safetensors").write_bytes(b"half")
        row.times += 1
    assert lines_with(watched(*RUN).check().out, "Resuming at step 29 of 30")
    assert not list(watched.checkpoints.glob("*.tmp"))
    row.hold_against(watched, reference)

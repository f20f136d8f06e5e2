"""What a run may go on from, and what it says where it may not."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from fastjepa.config import load_config
from fastjepa.engine.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    Position,
    checkpoint_path,
    load_checkpoint,
    state_of,
)
from fastjepa.engine.checkpoints.resume import check_continues, check_fits
from fastjepa.engine.checkpoints.write import write_checkpoint
from fastjepa.engine.learner import Learner
from fastjepa.engine.processes.activity import LONG, Doing
from fastjepa.engine.run import Run
from fastjepa.train import main

if TYPE_CHECKING:
    from tests.conftest import Trainer

POSITION = Position(7, 112, 1.5, dataset_images=280, micro_batch=16, dataset_checksum=1)
TRUNCATE = ["masks.mode=truncate"]
FORCE = "run.resume=force"


@pytest.mark.parametrize(
    ("start", "overrides", "refusal"),
    [
        (POSITION, [], None),
        (POSITION, ["speed.workers=0", "run.log_every=3", "probe.bank=9", "speed.accumulation=2"], None),
        (POSITION, ["optim.lr=5e-4"], r"optim\.lr: 0\.001 -> 0\.0005"),
        (replace(POSITION, dataset_images=281), [], "a set of 280 images, here are 281"),
        (replace(POSITION, dataset_checksum=2), [], "280 images of other names"),
        (replace(POSITION, dataset_checksum=0), [], None),
        (replace(POSITION, micro_batch=8), [], None),
        (replace(POSITION, micro_batch=8), [*TRUNCATE, "objective.name=mae"], None),
        (replace(POSITION, micro_batch=8), TRUNCATE, "micro-batches of 16 images, here they have 8"),
    ],
)
def test_what_a_run_may_go_on_from(
    tmp_path: Path, start: Position, overrides: list[str], refusal: str | None
) -> None:
    there = load_config(None, overrides if TRUNCATE[0] in overrides else [])
    checkpoint = Checkpoint(tmp_path, POSITION, there.to_dict(), {})
    here, forced = load_config(None, overrides), load_config(None, [*overrides, FORCE])
    if refusal is None:
        assert check_continues(checkpoint, start, here) == []
        assert check_continues(checkpoint, start, forced) == []
        return
    with pytest.raises(CheckpointError, match=refusal) as caught:
        check_continues(checkpoint, start, here)
    assert f"run.init_from={tmp_path}" in str(caught.value)
    assert FORCE in str(caught.value)
    (warning,) = check_continues(checkpoint, start, forced)
    assert warning.startswith("going on all the same, for run.resume is force: ")
    with pytest.raises(CheckpointError, match=refusal):
        raise CheckpointError(warning)


def test_a_run_stops_at_what_another_version_wrote(train: "Trainer") -> None:
    """It would go on from the one before, and overwrite it."""
    train("optim.steps=6", "run.save_every=3").check()
    path = checkpoint_path(train.run / "checkpoints", 6)
    (path / "state.json").write_text('{"format": 2, "versions": {"fastjepa": "9.1"}}')
    (path / "manifest.json").write_text('{"files": []}')
    before = {file: file.read_bytes() for file in train.run.rglob("*") if file.is_file()}
    for settings in (("run.log_every=1",), ("optim.lr=2e-3", "run.resume=force")):
        refused = train("optim.steps=6", *settings).check(1)
        assert f"{path} has checkpoint format 2, this version reads 1: use the fastjepa 9.1" in refused.err
        assert {f: f.read_bytes() for f in before} == before


def test_reading_a_checkpoint_may_take_as_long_as_writing_one(
    train: "Trainer", monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watch gives a rank that reads more time than one that computes."""
    seen: list[Doing] = []
    take_up = Run._take_up

    def note(run: Run, learner: Learner) -> None:
        seen.append(run.world.activity.now.doing)
        take_up(run, learner)

    monkeypatch.setattr(Run, "_take_up", note)
    assert main(["--config", str(train.write_config()), "optim.steps=6"]) == 0
    assert len(seen) == 1
    assert set(seen) <= LONG


@pytest.mark.parametrize("config", [{"optim": {"lrr": 1}}, {"optim": 3}, {"masks": {"mode": "new"}}])
def test_settings_of_another_version_are_refused_by_name(tmp_path: Path, config: dict[str, object]) -> None:
    checkpoint = Checkpoint(tmp_path / "step_7", POSITION, config, {}, "fastjepa 9.1")
    with pytest.raises(CheckpointError, match=r"step_7 has settings that.*use the fastjepa 9\.1 that wrote"):
        check_continues(checkpoint, POSITION, load_config(None))
    assert len(check_continues(checkpoint, POSITION, load_config(None, [FORCE]))) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"student": {"a": (4, 3)}}, "student: b, which this model has not"),
        ({"student": {"a": (4, 3), "b": (1,), "c": (2,)}}, "student: no tensor c"),
        ({"student": {"a": (3, 4), "b": (1,)}}, r"student: a is \[4, 3\], this model has \[3, 4\]"),
        ({"target": {"a": (4, 3)}}, r"no target\.safetensors"),
        ({"exp_avg": None}, r"exp_avg\.safetensors, which this model has no use for"),
    ],
)
def test_tensors_of_another_model_are_named(
    tmp_path: Path, change: dict[str, dict[str, tuple[int, ...]] | None], said: str | None
) -> None:
    there = {"student": {"a": torch.zeros(4, 3), "b": torch.zeros(1)}, "exp_avg": {"a": torch.zeros(4, 3)}}
    path = write_checkpoint(tmp_path, 7, state_of(POSITION, {}, {}), there)
    wanted = {file: {name: tuple(t.shape) for name, t in named.items()} for file, named in there.items()}
    wanted = {file: shapes for file, shapes in (wanted | change).items() if shapes is not None}
    if said is None:
        check_fits(load_checkpoint(path), wanted)
        return
    with pytest.raises(CheckpointError, match=said) as caught:
        check_fits(load_checkpoint(path), wanted)
    assert str(caught.value).startswith(
        f"{path} is of another model: use the model and objective settings of"
    )

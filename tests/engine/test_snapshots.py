"""Pictures of the features along the way: few, well spread, and without any influence on the training."""

import shutil
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from fastjepa.engine.snapshots import MOST, cut_after, thin, thinned

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Trainer

ascending = st.lists(st.integers(0, 10**6), unique=True, min_size=1).map(sorted)


def grown(steps: list[int], most: int) -> list[int]:
    """What is on the disk when steps come one after another, as they do in a run."""
    kept: list[int] = []
    for step in steps:
        kept = thinned([*kept, step], most)
    return kept


@given(steps=ascending, most=st.integers(2, 12))
def test_first_and_last_stay_and_the_number_is_bounded(steps: list[int], most: int) -> None:
    for kept in (thinned(steps, most), grown(steps, most)):
        assert kept == sorted(set(kept))
        assert set(kept) <= set(steps)
        assert kept[0] == steps[0]
        assert kept[-1] == steps[-1]
        assert len(kept) == min(len(steps), most)


@given(steps=ascending, most=st.integers(2, 12))
def test_few_enough_all_stay(steps: list[int], most: int) -> None:
    assert thinned(thinned(steps, most), most) == thinned(steps, most)
    assert thinned(steps[:most], most) == steps[:most]


@given(count=st.integers(MOST, 2000), every=st.integers(1, 1000))
def test_no_part_of_a_run_is_left_out(count: int, every: int) -> None:
    """As factors: the best that so many can do is a root of the whole, and its square is allowed."""
    _, *kept = grown([every * i for i in range(count + 1)], MOST)
    assert kept[0] == every
    best = count ** (1 / (MOST - 2))
    assert max(b / a for a, b in pairwise(kept)) <= max(best**2, 2)


def test_files_are_thinned_and_cut(tmp_path: Path) -> None:
    for step in range(0, 1001, 10):
        (tmp_path / f"step_{step:08d}.safetensors").write_bytes(b"")
        thin(tmp_path)
    found = sorted(int(path.stem[5:]) for path in tmp_path.iterdir())
    assert len(found) == MOST
    assert (found[0], found[-1]) == (0, 1000)

    (tmp_path / "step_00000500.tmp").write_bytes(b"half")
    (tmp_path / "note.txt").write_text("of a person")
    cut_after(tmp_path, 100)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f"step_{step:08d}.safetensors" for step in found if step <= 100} | {"note.txt"}
    cut_after(tmp_path / "nowhere", 0)


def test_they_are_made_at_each_judgement_and_change_no_bit(
    trainer_at: "Callable[[Path], Trainer]", tmp_path: Path
) -> None:
    runs = [trainer_at(tmp_path / name) for name in ("watched", "alone")]
    for trainer, every in zip(runs, (3, 0), strict=True):
        trainer.home.mkdir()
        trainer("optim.steps=12", "run.save_every=12", f"probe.every_steps={every}").check()
    watched, alone = runs
    folders = [run.run / "report" / "snapshots" for run in runs]
    steps = [sorted(int(path.stem[5:]) for path in folder.iterdir()) for folder in folders]
    assert steps == [[0, 3, 6, 9, 12], [0, 12]]
    for path in (watched.run / "checkpoints" / "step_00000012").glob("*.safetensors"):
        other = alone.run / "checkpoints" / "step_00000012" / path.name
        assert path.read_bytes() == other.read_bytes()
    with_others, by_itself = (load_file(folder / "step_00000012.safetensors") for folder in folders)
    torch.testing.assert_close(with_others, by_itself, rtol=0, atol=0, equal_nan=True)


def test_snapshots_after_the_checkpoint_go_when_a_run_resumes(train: "Trainer") -> None:
    train("optim.steps=10", "probe.every_steps=2").check()
    shutil.rmtree(train.run / "checkpoints" / "step_00000010")  # as if it had been killed after step 5
    stale = train.run / "report" / "snapshots" / "step_00000009.safetensors"
    stale.write_bytes(b"of what came after")
    (stale.parent / "step_00000007.tmp").write_bytes(b"half")
    train("optim.steps=10", "probe.every_steps=2").check()
    steps = sorted(path.name for path in stale.parent.iterdir())
    assert steps == [f"step_{step:08d}.safetensors" for step in range(0, 11, 2)]

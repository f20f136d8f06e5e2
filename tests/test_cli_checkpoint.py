"""`fastjepa checkpoint`: what there is, whether it is good, and what may go."""

import errno
import fcntl
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastjepa.cli import main
from fastjepa.config import load_config
from fastjepa.engine.checkpoints.checkpoint import (
    Position,
    checkpoint_path,
    list_checkpoints,
    state_of,
    step_of,
)
from fastjepa.engine.checkpoints.keep import Keep
from fastjepa.engine.checkpoints.listing import age_of, carry_out, describe, plan_pruning
from fastjepa.engine.checkpoints.tensorfile import Fingerprint, fingerprint
from fastjepa.engine.checkpoints.write import write_checkpoint

VERSIONS = {"fastjepa": "0.1.0", "torch": "2.14.1"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with checkpoints of the steps 10 to 50, and a leftover."""
    config = load_config(None, ["run.keep_last=2", "run.keep_every=20"]).to_dict()
    for step in (10, 20, 30, 40, 50):
        state = state_of(Position(step, 0, 0.0, 0, 0), config, VERSIONS, ranks=2, zero_stage=1)
        write_checkpoint(tmp_path / "checkpoints", step, state, {"student": {"a": torch.zeros(1000)}})
    (tmp_path / ".lock").write_text("")
    leftover = tmp_path / "checkpoints" / "step_00000060.tmp"
    leftover.mkdir()
    (leftover / "student.safetensors").write_text("")
    return tmp_path


def damage(run: Path, step: int) -> Path:
    file = checkpoint_path(run / "checkpoints", step) / "student.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return file


def steps(run: Path) -> list[int]:
    return sorted(map(step_of, list_checkpoints(run / "checkpoints")))


@pytest.mark.parametrize("source", ["", "checkpoints", "checkpoints/step_00000030"])
def test_ls(run: Path, capsys: pytest.CaptureFixture[str], source: str) -> None:
    (checkpoint_path(run / "checkpoints", 10) / "state.json").unlink()
    assert main(["checkpoint", "ls", str(run / source)]) == 0
    heading, *rows, leftover = capsys.readouterr().out.splitlines()
    assert heading.split() == ["step", "age", "size", "complete", "kept", "as", "written", "by"]
    assert [row.split()[0] for row in rows] == ["50", "40", "30", "20", "10"]
    for row, why in zip(rows, ("newest", "one of the last 2", "-", "every 20"), strict=False):
        assert f"  yes  {why}" in " ".join(row.split()).replace(" yes ", "  yes  ")
        assert row.endswith("2 ranks, ZeRO 1, fastjepa 0.1.0, torch 2.14.1")
    assert "no: state.json" in rows[-1]
    assert rows[-1].endswith("unknown")
    assert leftover.endswith("step_00000060.tmp is being written, or was when its run was killed")


def test_verify(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count(" is good\n") == 5
    file = damage(run, 30)
    assert main(["checkpoint", "verify", str(run)]) == 1
    said = capsys.readouterr()
    assert f"{file} is damaged: it differs from the manifest\n" in said.out
    assert said.out.count(" is good\n") == 4
    assert said.err == "error: 1 of 5 checkpoints are damaged\n"
    assert main(["checkpoint", "verify", str(file.parent)]) == 1
    assert main(["checkpoint", "verify", str(checkpoint_path(run / "checkpoints", 50))]) == 0


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        (["--keep-last", "1"], [50]),
        (["--keep-last", "2", "--keep-every", "20"], [20, 40, 50]),
        (["--keep-last", "9"], [10, 20, 30, 40, 50]),
    ],
)
def test_prune(run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], left: list[int]) -> None:
    before = sorted(run.rglob("*"))
    assert main(["checkpoint", "prune", str(run), *arguments, "--dry-run"]) == 0
    would = capsys.readouterr().out
    assert sorted(run.rglob("*")) == before
    assert main(["checkpoint", "prune", str(run), *arguments]) == 0
    assert capsys.readouterr().out == would.replace("would delete", "deleted")
    assert steps(run) == left
    assert not list(run.rglob("*.tmp"))
    assert main(["checkpoint", "prune", str(run), *arguments]) == 0
    assert capsys.readouterr().out == "nothing to delete\n"


def test_prune_keeps_the_newest_good_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = [damage(run, step) for step in (40, 50)]
    assert main(["checkpoint", "prune", str(run), "--keep-last", "1"]) == 0
    said = capsys.readouterr().out
    assert steps(run) == [30, 40, 50]
    for file in damaged:
        assert f"note: {file} is damaged: it differs from the manifest; left as it is\n" in said
    damage(run, 30)
    assert main(["checkpoint", "prune", str(run), "--keep-last", "1"]) == 1
    assert "is good: nothing is deleted" in capsys.readouterr().err
    assert steps(run) == [30, 40, 50]


def test_prune_leaves_what_a_run_is_writing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (run / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["checkpoint", "prune", str(run), "--keep-last", "2"]) == 0
    assert f"step_00000060.tmp stays: a run is training in {run}\n" in capsys.readouterr().out
    assert [path.name for path in run.rglob("*.tmp")] == ["step_00000060.tmp"]
    assert steps(run) == [40, 50]


@pytest.mark.parametrize("at", ["checkpoints", "checkpoints/step_00000030"])
def test_the_folder_one_stands_in(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    monkeypatch.chdir(run / at)
    assert main(["checkpoint", "verify", "."]) == 0
    assert capsys.readouterr().out.count(" is good\n") == (5 if at == "checkpoints" else 1)
    monkeypatch.chdir(run / "checkpoints")
    with (run / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["checkpoint", "prune", ".", "--keep-last", "5"]) == 0
    assert (run / "checkpoints" / "step_00000060.tmp").exists(), "a run is writing it"


def test_a_single_checkpoint_is_not_pruned(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = checkpoint_path(run / "checkpoints", 10)
    assert main(["checkpoint", "prune", str(one), "--keep-last", "1"]) == 1
    assert capsys.readouterr().err == (
        f"error: {one} is one checkpoint, and prune chooses among all of a run: give {one.parent}, or delete "
        "that folder yourself to be rid of it alone\n"
    )
    assert steps(run) == [10, 20, 30, 40, 50]


def test_a_run_may_begin_while_one_prunes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One begins whenever something is deleted, and its first save clears leftovers away."""
    begun: list[str] = []
    rmtree = shutil.rmtree

    def deleting(path: Path, **options: Any) -> None:
        with (run / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        begun.append(path.name)
        if ".tmp" in path.suffixes and len(begun) == 5:
            rmtree(path)
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", deleting)
    assert main(["checkpoint", "prune", str(run), "--keep-last", "1", "--dry-run"]) == 0
    assert begun == []
    assert main(["checkpoint", "prune", str(run), "--keep-last", "1"]) == 0
    assert len(begun) == 5
    assert steps(run) == [50]
    assert not list(run.rglob("*.tmp"))


def test_on_a_drive_without_locks_leftovers_stay(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer is given by hand: no such drive can be mounted everywhere."""

    def flock(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert main(["checkpoint", "prune", str(run), "--keep-last", "1"]) == 0
    said = capsys.readouterr().out
    assert f"step_00000060.tmp stays: {run / '.lock'} cannot be locked (No locks available)" in said
    assert (run / "checkpoints" / "step_00000060.tmp").exists()
    assert steps(run) == [50]


def test_without_a_lock_nobody_can_say_whether_a_run_is_writing(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / ".lock").unlink()
    assert main(["checkpoint", "prune", str(run), "--keep-last", "1"]) == 0
    assert f"step_00000060.tmp stays: there is no {run / '.lock'}" in capsys.readouterr().out
    assert (run / "checkpoints" / "step_00000060.tmp").exists()
    assert steps(run) == [50]


def test_by_way_of_a_link(run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    link = tmp_path_factory.mktemp("elsewhere") / "link"
    link.symlink_to(run / "checkpoints")
    with (run / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["checkpoint", "prune", str(link), "--keep-last", "5"]) == 0
    assert (run / "checkpoints" / "step_00000060.tmp").exists()


def test_damaged_ones_do_not_count(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(run, 40)
    assert main(["checkpoint", "prune", str(run), "--keep-last", "2"]) == 0
    assert "differs from the manifest; left as it is" in capsys.readouterr().out
    assert steps(run) == [30, 40, 50]


def test_what_another_version_wrote_stays(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (20, 50):
        path = checkpoint_path(run / "checkpoints", step)
        for file in path.iterdir():
            file.unlink()
        (path / "state.json").write_text('{"format": 2, "versions": {"fastjepa": "9.1"}}')
        (path / "shards").mkdir()
    assert main(["checkpoint", "ls", str(run)]) == 0
    assert capsys.readouterr().out.count("no: of another version") == 2
    assert main(["checkpoint", "verify", str(run)]) == 1
    said = capsys.readouterr()
    assert "step_00000050 has checkpoint format 2, this version reads 1: use the fastjepa 9.1" in said.out
    assert said.err == "error: 0 of 5 checkpoints are damaged, 2 of another version\n"
    assert main(["checkpoint", "prune", str(run), "--keep-last", "1"]) == 0
    assert steps(run) == [20, 40, 50]


def test_what_a_run_deletes_meanwhile_is_no_damage(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process deletes the oldest ones while the newest is read."""
    from fastjepa.engine.checkpoints import verify

    def read(path: Path) -> Fingerprint:
        for step in (10, 20):
            shutil.rmtree(checkpoint_path(run / "checkpoints", step), ignore_errors=True)
        return fingerprint(path)

    monkeypatch.setattr(verify, "fingerprint", read)
    assert main(["checkpoint", "verify", str(run)]) == 0
    said = capsys.readouterr().out
    assert said.count(" is good\n") == 3
    assert said.count(" is gone: deleted while it was to be read\n") == 2


def test_pruning_goes_on_past_what_is_gone_already(run: Path) -> None:
    directory = run / "checkpoints"
    planned = plan_pruning(directory, Keep(1))
    shutil.rmtree(checkpoint_path(directory, 40))
    assert describe(checkpoint_path(directory, 40)) is None
    done = carry_out(directory, planned)
    assert steps(run) == [50]
    assert done.notes == [f"{checkpoint_path(directory, 40)} is gone already"]


def test_verifying_nothing_is_no_success(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in list_checkpoints(run / "checkpoints"):
        shutil.rmtree(path)
    assert main(["checkpoint", "verify", str(run)]) == 1
    assert "nothing was verified: " in capsys.readouterr().err


def test_where_there_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for action in (["ls"], ["verify"], ["prune", "--keep-last", "1"]):
        for path in (tmp_path, tmp_path / "nowhere"):
            assert main(["checkpoint", *action, str(path)]) == 1
            said = capsys.readouterr().err
            assert said == f"error: no checkpoints in {path}: give the folder of a run, or its checkpoints/\n"


@pytest.mark.parametrize("count", ["0", "-1", "two", "1.5"])
def test_prune_keeps_at_least_one(run: Path, capsys: pytest.CaptureFixture[str], count: str) -> None:
    with pytest.raises(SystemExit):
        main(["checkpoint", "prune", str(run), "--keep-last", count])
    assert "must be a whole number of at least 1" in capsys.readouterr().err


def test_ages() -> None:
    assert [age_of(s) for s in (-3, 5, 90, 7300, 200_000)] == ["0 s", "5 s", "2 min", "2 h", "2 d"]

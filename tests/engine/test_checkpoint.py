"""Checkpoints on disk: whole or not there, and never trusted unseen."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastjepa.config import Config, load_config
from fastjepa.engine.checkpoint import (
    Checkpoint,
    CheckpointError,
    Position,
    check_continues,
    checkpoint_path,
    keep_newest,
    list_checkpoints,
    load_checkpoint,
    newest_good,
    verify_checkpoint,
    write_checkpoint,
)

POSITION = Position(
    step=7, images_seen=112, train_s=1.5, dataset_images=280, micro_batch=16, losses=(0.1, 2e-9)
)
VERSIONS = {"fastjepa": "0.1.0"}
TENSORS = ("exp_avg", "exp_avg_sq", "student")
FILES = ["manifest.json", "state.json", *(f"{name}.safetensors" for name in TENSORS)]


def some_tensors(seed: int = 0, numel: int = 12) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: {"encoder.a": torch.randn(numel, generator=generator), "b": torch.randn(1, generator=generator)}
        for name in TENSORS
    }


def write(directory: Path, step: int = 7, numel: int = 12) -> Path:
    position = replace(POSITION, step=step)
    return write_checkpoint(directory, position, Config().to_dict(), some_tensors(step, numel), VERSIONS)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert path == checkpoint_path(tmp_path, 7)
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    verify_checkpoint(path)
    checkpoint = load_checkpoint(path)
    assert checkpoint.position == POSITION
    assert checkpoint.config == Config().to_dict()
    for name, tensors in some_tensors(7).items():
        assert checkpoint.tensors[name].keys() == tensors.keys()
        assert all(torch.equal(checkpoint.tensors[name][key], tensors[key]) for key in tensors)


def test_nothing_in_it_is_a_pickle(tmp_path: Path) -> None:
    for file in write(tmp_path).iterdir():
        if file.suffix == ".json":
            json.loads(file.read_text())
            continue
        header_bytes = int.from_bytes(file.read_bytes()[:8], "little")
        header = json.loads(file.read_bytes()[8 : 8 + header_bytes])
        assert all(entry["dtype"] == "F32" for name, entry in header.items() if name != "__metadata__")


def test_a_pickle_in_the_place_of_tensors_is_not_loaded(tmp_path: Path) -> None:
    path = write(tmp_path)
    (path / "exp_avg.safetensors").write_bytes(pickle.dumps(os.system))
    with pytest.raises(CheckpointError, match=r"exp_avg\.safetensors is damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["deleted", "emptied", "truncated", "flipped"])
def test_damage_is_named_and_the_one_before_taken(tmp_path: Path, name: str, how: str) -> None:
    good, bad = write(tmp_path, step=5), write(tmp_path, step=7)
    content = bytearray((bad / name).read_bytes())
    if how == "deleted":
        (bad / name).unlink()
    else:
        content[len(content) // 2] ^= 4
        kept = {"emptied": 0, "truncated": len(content) - 1, "flipped": len(content)}[how]
        (bad / name).write_bytes(content[:kept])
    found, damaged = newest_good(tmp_path)
    assert found == good
    assert len(damaged) == 1
    assert name.partition(".")[0] in damaged[0]


@pytest.mark.parametrize(
    "manifest", ["{}", "[]", "null", '{"state.json": {}}', '{"../../x": {"bytes": 1}}', "\x00"]
)
def test_a_manifest_that_vouches_for_nothing_is_damage(tmp_path: Path, manifest: str) -> None:
    (write(tmp_path) / "manifest.json").write_text(manifest)
    found, damaged = newest_good(tmp_path)
    assert found is None
    assert "manifest.json is damaged" in damaged[0]


def test_unknown_format_is_refused_with_the_version_that_wrote_it(tmp_path: Path) -> None:
    path = write(tmp_path)
    state = json.loads((path / "state.json").read_text()) | {"format": 99}
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"format 99, this version reads 1.*0\.1\.0"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "state", ["{}", "[]", '{"format": 1, "position": {}}', '{"format": 1, "position": 3}']
)
def test_unreadable_state_is_an_error_of_ours(tmp_path: Path, state: str) -> None:
    path = write(tmp_path)
    (path / "state.json").write_text(state)
    with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
        load_checkpoint(path)


def test_leftovers_are_no_checkpoints(tmp_path: Path) -> None:
    path = write(tmp_path)
    for name in ("step_00000009.tmp", "step_", "step_x", "step_-1", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000010").write_text("a file")
    assert list_checkpoints(tmp_path) == [path]
    assert list_checkpoints(tmp_path / "nowhere") == []
    write(tmp_path, step=8)
    assert not (tmp_path / "step_00000009.tmp").exists(), "it takes up space for ever"


@given(
    steps=st.sets(st.integers(1, 10**9), min_size=1, max_size=8),
    count=st.integers(1, 4),
    data=st.data(),
)
@settings(deadline=None, max_examples=30)
def test_keep_newest(
    tmp_path_factory: pytest.TempPathFactory, steps: set[int], count: int, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("keep")
    for step in steps:
        checkpoint_path(directory, step).mkdir()
    now = data.draw(st.sampled_from(sorted(steps)))
    keep_newest(directory, now, count)
    left = {int(path.name[5:]) for path in list_checkpoints(directory)}
    later = {step for step in steps if step > now}
    assert left == later | set(sorted(steps - later)[-count:])
    assert now in left


SAVE_FOREVER = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from fastjepa.engine.checkpoint import Position, keep_newest, write_checkpoint
directory, step = Path(sys.argv[1]), 0
tensors = {name: {"a": torch.randn(2_000_000)} for name in ("student", "exp_avg", "exp_avg_sq")}
while True:
    step += 1
    write_checkpoint(directory, Position(step, 0, 0.0, 0, 0), {}, tensors, {})
    keep_newest(directory, step, 2)
    print(step, flush=True)
"""


def test_killed_while_saving(tmp_path: Path) -> None:
    """At whatever moment: the newest that was reported, or one just finished, is there and good."""
    for delay_s in (0.0, 0.003, 0.02, 0.05):
        with subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, str(tmp_path / str(delay_s))],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        ) as process:
            assert process.stdout is not None
            reported = [int(process.stdout.readline()) for _ in range(3)][-1]
            time.sleep(delay_s)
            process.send_signal(signal.SIGKILL)
            reported = max([reported, *map(int, process.stdout.read().split())])
        found, damaged = newest_good(tmp_path / str(delay_s))
        assert damaged == []
        assert found is not None
        assert load_checkpoint(found).position.step in (reported, reported + 1)


SAVE_ONTO_FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from fastjepa.engine.checkpoint import Position, write_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
tensors = {name: {"a": torch.zeros(25_000)} for name in ("student", "exp_avg", "exp_avg_sq")}
try:
    write_checkpoint(Path(sys.argv[1]), Position(8, 0, 0.0, 0, 0), {"long": "x" * 200_000}, tensors, {})
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits on the size of files")
@pytest.mark.parametrize("most_bytes", [0, 50_000, 150_000], ids=["nothing", "weights", "state"])
def test_full_disk_leaves_no_trace(tmp_path: Path, most_bytes: int) -> None:
    before = write(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", SAVE_ONTO_FULL_DISK, str(tmp_path), str(most_bytes)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "File too large" in done.stdout
    assert list(tmp_path.iterdir()) == [before]
    verify_checkpoint(before)


@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors in /proc")
def test_saving_often_leaks_nothing(tmp_path: Path) -> None:
    write(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for step in range(8, 60):
        write(tmp_path, step)
        newest_good(tmp_path)
        load_checkpoint(checkpoint_path(tmp_path, step))
        keep_newest(tmp_path, step, 2)
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(list(tmp_path.iterdir())) == 2


TRUNCATE = ["masks.mode=truncate"]


@pytest.mark.parametrize(
    ("start", "overrides", "refusal"),
    [
        (POSITION, [], None),
        (POSITION, ["speed.workers=0", "run.log_every=3", "probe.bank=9", "speed.accumulation=2"], None),
        (POSITION, ["optim.lr=5e-4"], r"optim\.lr: 0\.001 -> 0\.0005"),
        (replace(POSITION, dataset_images=281), [], "a set of 280 images, here are 281"),
        (replace(POSITION, micro_batch=8), [], None),
        (replace(POSITION, micro_batch=8), TRUNCATE, "micro-batches of 16 images, here they have 8"),
    ],
)
def test_what_a_run_may_go_on_from(
    tmp_path: Path, start: Position, overrides: list[str], refusal: str | None
) -> None:
    there = load_config(None, TRUNCATE if overrides == TRUNCATE else [])
    checkpoint = Checkpoint(tmp_path, POSITION, there.to_dict(), {})
    if refusal is None:
        check_continues(checkpoint, start, load_config(None, overrides))
    else:
        with pytest.raises(CheckpointError, match=refusal) as caught:
            check_continues(checkpoint, start, load_config(None, overrides))
        assert f"run.init_from={tmp_path}" in str(caught.value)

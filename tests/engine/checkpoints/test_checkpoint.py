"""Checkpoints on disk: whole or not there, and never trusted unseen."""

import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from fastjepa.config import Config
from fastjepa.engine.checkpoints.checkpoint import (
    CheckpointError,
    OtherVersion,
    Position,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    state_of,
)
from fastjepa.engine.checkpoints.keep import Keep, prune
from fastjepa.engine.checkpoints.verify import damage_of, newest_good, verify_checkpoint
from fastjepa.engine.checkpoints.write import write_checkpoint

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
    state = state_of(replace(POSITION, step=step), Config().to_dict(), VERSIONS)
    return write_checkpoint(directory, step, state, some_tensors(step, numel))


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


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_in_the_place_of_tensors_is_not_loaded(tmp_path: Path, protocol: int) -> None:
    """Not even where the manifest vouches for it: whoever can write a file can write that too."""
    path = write(tmp_path)
    forge(path, "exp_avg.safetensors", pickle.dumps(os.system, protocol))
    verify_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"exp_avg\.safetensors is (a pickle|no safetensors file)"):
        load_checkpoint(path)


def test_what_torch_saves_is_not_loaded(tmp_path: Path) -> None:
    path, buffer = write(tmp_path), io.BytesIO()
    torch.save(some_tensors(7)["exp_avg"], buffer)
    forge(path, "exp_avg.safetensors", buffer.getvalue())
    with pytest.raises(
        CheckpointError, match=r"a zip of pickles as torch\.save writes it: not opened; take an"
    ):
        load_checkpoint(path)


def forge(path: Path, name: str, content: bytes) -> None:
    """Put something else in the place of a file, in the manifest too."""
    (path / name).write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_tensors_of_another_type_are_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path)
    forge(path, "student.safetensors", save({"encoder.a": torch.zeros(12).bfloat16(), "b": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"student\.safetensors: encoder\.a is of dtype BF16, exp"):
        load_checkpoint(path)


def test_a_file_that_the_manifest_does_not_know_is_damage(tmp_path: Path) -> None:
    path = write(tmp_path)
    (path / "target.safetensors").write_bytes(save({"encoder.a": torch.zeros(12)}))
    (path / "extra.pkl").write_bytes(pickle.dumps(3))
    assert damage_of(path) == [
        f"{path / name} is not in the manifest" for name in ("extra.pkl", "target.safetensors")
    ]


def test_every_damaged_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path)
    for name in ("exp_avg.safetensors", "state.json"):
        with (path / name).open("ab") as file:
            file.write(b"x")
    said = sorted(damage_of(path))
    assert len(said) == 2
    assert all(name in line for name, line in zip(("exp_avg.safetensors", "state.json"), said, strict=True))


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


@pytest.mark.parametrize("manifest", [None, "{}", '{"files": {"all.bin": 12}}'])
def test_another_format_is_neither_damage_nor_deleted(tmp_path: Path, manifest: str | None) -> None:
    """Whatever its files are: the run would go on from the one before, and overwrite it."""
    write(tmp_path, step=5)
    path = write(tmp_path)
    forge(path, "state.json", b'{"format": 2, "versions": {"fastjepa": "9.1"}, "layout": "new"}')
    if manifest is not None:
        (path / "manifest.json").write_text(manifest)
        (path / "student.safetensors").rename(path / "all.bin")
    with pytest.raises(OtherVersion, match=r"format 2, this version reads 1: use the fastjepa 9\.1 that"):
        newest_good(tmp_path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    write(tmp_path, step=7)
    aside = tmp_path / "step_00000007.aside"
    assert {file.name: file.read_bytes() for file in aside.iterdir()} == before
    assert newest_good(tmp_path) == (path, [])


@pytest.mark.parametrize("extra", [False, True])
def test_what_a_new_checkpoint_replaces_goes_only_if_it_is_damaged(tmp_path: Path, extra: bool) -> None:
    path = write(tmp_path)
    (path / "student.safetensors").write_bytes(b"")
    if extra:
        (path / "notes.txt").write_text("mine")
    write(tmp_path)
    assert newest_good(tmp_path) == (path, [])
    kept = [file.read_text() for file in tmp_path.glob("*.aside/notes.txt")]
    assert kept == (["mine"] if extra else [])
    write(tmp_path)
    write(tmp_path)
    assert len(list(tmp_path.glob("*.aside*"))) == 2 + extra, "good ones are never deleted"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": "ten"}, r"position\.step must be a whole number of at least 0, got 'ten'"),
        ({"step": True}, r"position\.step must be a whole number"),
        ({"step": -7}, r"position\.step must be a whole number"),
        ({"train_s": "x"}, r"position\.train_s must be a number"),
        ({"losses": 3}, r"position\.losses must be a list of numbers, got 3"),
        ({"losses": [None]}, r"position\.losses must be a list of numbers"),
        ({"step": 8}, "holds step 8, as its state.json says, and not that of its name: rename it to step_0"),
    ],
)
def test_a_position_that_is_none_is_damage(tmp_path: Path, change: dict[str, object], said: str) -> None:
    good, path = write(tmp_path, step=5), write(tmp_path)
    state = json.loads((path / "state.json").read_text())
    state["position"] |= change
    forge(path, "state.json", json.dumps(state).encode())
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(path)
    found, (line,) = newest_good(tmp_path)
    assert found == good
    with pytest.raises(CheckpointError, match=said):
        raise CheckpointError(line)


def test_a_position_of_a_later_version_is_for_that_version(tmp_path: Path) -> None:
    path = write(tmp_path)
    state = json.loads((path / "state.json").read_text())
    state["position"] |= {"shard": 3}
    forge(path, "state.json", json.dumps(state).encode())
    with pytest.raises(OtherVersion, match=r"has position\.shard, which.*use the fastjepa 0\.1\.0 that"):
        newest_good(tmp_path)


def test_a_copy_under_another_name_is_not_taken_for_a_later_one(tmp_path: Path) -> None:
    path = write(tmp_path)
    shutil.copytree(path, tmp_path / "step_99")
    found, (line,) = newest_good(tmp_path)
    assert found == path
    assert f"{tmp_path / 'step_99'} holds step 7" in line


def test_a_name_without_zeros_is_read_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path).rename(tmp_path / "step_7")
    assert newest_good(tmp_path) == (path, [])
    assert load_checkpoint(path).position.step == 7


@pytest.mark.parametrize("config", ["3", "null", "[]"])
def test_a_config_that_is_none_is_damage(tmp_path: Path, config: str) -> None:
    path = write(tmp_path)
    state = json.loads((path / "state.json").read_text()) | {"config": json.loads(config)}
    forge(path, "state.json", json.dumps(state).encode())
    with pytest.raises(
        CheckpointError, match=r"state\.json is damaged: it must hold a position and a config"
    ):
        load_checkpoint(path)


@pytest.mark.skipif(sys.platform != "linux", reason="finds files in /proc")
def test_the_folders_above_are_synced_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a crash of the machine loses the first checkpoint with the folder it is in."""
    synced, fsync = [], os.fsync

    def note(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    write(tmp_path / "run" / "checkpoints")
    folders = [path for path in synced if path.is_dir()]
    assert folders[:2] == [tmp_path, tmp_path / "run"]
    assert folders[-1] == tmp_path / "run" / "checkpoints"


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


SAVE_FOREVER = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from fastjepa.engine.checkpoints.checkpoint import Position, state_of
from fastjepa.engine.checkpoints.keep import Keep, prune
from fastjepa.engine.checkpoints.write import write_checkpoint
directory, step = Path(sys.argv[1]), 0
tensors = {name: {"a": torch.randn(2_000_000)} for name in ("student", "exp_avg", "exp_avg_sq")}
while True:
    step += 1
    write_checkpoint(directory, step, state_of(Position(step, 0, 0.0, 0, 0), {}, {}), tensors)
    prune(directory, step, Keep(2))
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
from fastjepa.engine.checkpoints.checkpoint import Position, state_of
from fastjepa.engine.checkpoints.write import write_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
tensors = {name: {"a": torch.zeros(25_000)} for name in ("student", "exp_avg", "exp_avg_sq")}
try:
    state = state_of(Position(8, 0, 0.0, 0, 0), {"long": "x" * 200_000}, {})
    write_checkpoint(Path(sys.argv[1]), 8, state, tensors)
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
        prune(tmp_path, step, Keep(2))
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(list(tmp_path.iterdir())) == 2

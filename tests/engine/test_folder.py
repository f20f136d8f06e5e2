"""The run folder, and its file of metrics."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from fastjepa.config import Config, ConfigError, load_config, parse_config
from fastjepa.engine.console import RunConsole
from fastjepa.engine.disk import Disk, remedy
from fastjepa.engine.folder import RunFolder, folder_of, replace_text
from fastjepa.engine.metrics import MetricsFile
from fastjepa.masks import Masks


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_name_is_put_into_the_path() -> None:
    assert folder_of(load_config(None, ["run.name=a"])).path == Path("runs/a")
    assert folder_of(load_config(None, ["run.dir='/x/{name}/y'", "run.name=a"])).path == Path("/x/a/y")
    with pytest.raises(ConfigError, match=r"run\.dir may hold \{name\}"):
        load_config(None, ["run.dir='/x/{name}/{y}'"])


def test_same_run_is_taken_up_again_with_what_changes_no_result(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "deep" / "run")
    folder.open(Config()).close()
    again = load_config(None, ["speed.workers=9", "run.log_every=3", "probe.bank=7", "data.root=/moved"])
    folder.open(again).close()
    assert load_config(folder.config) == Config(), "it may yet be refused"
    folder.write_config(again)
    assert load_config(folder.config) == again
    assert sorted(path.name for path in folder.path.iterdir()) == [".lock", "config.yaml"]


def test_only_one_process_trains_in_a_folder(tmp_path: Path) -> None:
    with RunFolder(tmp_path).open(Config()):
        before = (tmp_path / "config.yaml").read_bytes()
        with pytest.raises(ConfigError, match=f"another process is training in {tmp_path}: wait for it"):
            RunFolder(tmp_path).open(load_config(None, ["run.log_every=3"]), patience_s=0)
        assert (tmp_path / "config.yaml").read_bytes() == before
    RunFolder(tmp_path).open(Config()).close()


def test_another_run_is_refused_with_the_difference_and_left_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open(Config()).close()
    before = folder.config.read_bytes()
    with pytest.raises(ConfigError) as caught:
        folder.open(load_config(None, ["optim.lr=1e-4", "run.seed=3"]))
    assert "optim.lr: 0.001 -> 0.0001" in str(caught.value)
    assert "run.seed: 0 -> 3" in str(caught.value)
    assert "run.dir=" in str(caught.value)
    assert folder.config.read_bytes() == before


def test_a_folder_that_is_let_go_soon_is_waited_for(tmp_path: Path) -> None:
    with RunFolder(tmp_path).open(Config()) as held:
        end = threading.Timer(0.3, held.close)
        end.start()
        RunFolder(tmp_path).open(Config()).close()
        end.join()


@pytest.mark.parametrize("answer", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_drive_without_locks_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, answer: int
) -> None:
    """Its answer is given by hand: no such drive can be mounted everywhere."""

    def flock(*arguments: object) -> None:
        raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr(fcntl, "flock", flock)
    RunFolder(tmp_path).open(Config()).close()
    assert load_config(tmp_path / "config.yaml") == Config()
    [said] = caplog.messages
    assert said.startswith(f"{tmp_path} is on a drive without file locks ({os.strerror(answer)}): two runs")


def test_settings_that_are_there_already_are_not_written_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open(Config()).close()
    before = folder.config.stat()
    folder.write_config(Config())
    assert folder.config.stat() == before, "a full disk has no room for them"


def test_settings_are_on_the_disk_before_they_have_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def note_replace(old: Path, new: Path) -> None:
        done.append("rename")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    replace_text(tmp_path / "config.yaml", "run: {}")
    assert done == ["sync config.yaml.tmp", "rename", f"sync {tmp_path.name}"]


@pytest.mark.parametrize("text", ["", "a: [", "optim: {lr: fast}", "unknown: {}", "\x00"])
def test_unreadable_configuration_is_refused(tmp_path: Path, text: str) -> None:
    folder = RunFolder(tmp_path)
    folder.config.write_text(text)
    with pytest.raises(
        ConfigError, match=r"config\.yaml cannot be read: .*; delete it if it is of no use, or choose"
    ):
        folder.open(Config())
    assert folder.config.read_text() == text


@pytest.mark.parametrize("text", ["", "a: [", "\x00"])
def test_unreadable_configuration_beside_checkpoints_is_written_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    folder = RunFolder(tmp_path)
    (folder.checkpoints / "step_00000005").mkdir(parents=True)
    folder.config.write_text(text)
    folder.open(Config()).close()
    assert folder.config.read_text() == text, "it may yet be refused"
    folder.write_config(Config())
    assert load_config(folder.config) == Config()
    [said] = caplog.messages
    assert said.startswith(f"{folder.config} cannot be read: ")
    assert said.endswith("; it is written anew")
    assert "\n" not in said


@pytest.mark.parametrize("below", ["file", "file/run"])
def test_unwritable_folder_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write to the run folder .*; choose another run.dir"):
        RunFolder(tmp_path / below).open(Config())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="Permission denied"):
        RunFolder(tmp_path).open(Config())


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_unreadable_summary_is_no_summary(tmp_path: Path, text: str) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_summary() == {}
    folder.write_summary({"a": 1})
    assert folder.read_summary() == {"a": 1}
    folder.summary.write_text(text)
    assert folder.read_summary() == {}


@pytest.mark.parametrize("packed", [False, True])
def test_snapshot(tmp_path: Path, packed: bool) -> None:
    targets = torch.zeros(4, 2, 3, dtype=torch.int64)
    masks = Masks(torch.arange(10).view(2, 5), targets)
    if packed:
        masks = Masks(torch.arange(9), targets, torch.tensor([0, 4, 9], dtype=torch.int32))
    images, features = torch.zeros(2, 1, 28, 28, dtype=torch.uint8), torch.randn(2, 49, 8)
    RunFolder(tmp_path).write_snapshot(20, (7, 7), images, features, masks)
    [path] = (tmp_path / "report" / "snapshots").iterdir()
    assert path.name == "step_00000020.safetensors"
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"grid": "7,7", "step": "20"}
        assert torch.equal(file.get_tensor("features"), features.half())
        assert set(file.keys()) - {"images", "features", "targets"} == (
            {"context_flat", "cu_seqlens"} if packed else {"context"}
        )


def test_rows_of_one_step_become_one_object(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for row in (
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.4},
        {"step": 2, "knn_top1": 0.9},
        {"step": 3},
    ):
        file.write(row)
    assert rows(file.path) == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.4, "knn_top1": 0.9},
        {"step": 3},
    ]


@given(
    steps=st.lists(st.integers(0, 50), unique=True).map(sorted),
    cut=st.integers(0, 60),
    torn=st.sampled_from([b"", b'{"step": 7, "lo', b"\xff\n", b"[]\n", b'{"step": "x"}\n']),
)
def test_resumed_file_continues_after_the_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], cut: int, torn: bytes
) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    first = MetricsFile(path)
    for step in steps:
        first.write({"step": step, "loss": 1.0})
    with path.open("ab") as stream:
        stream.write(torn)

    resumed = MetricsFile(path)
    resumed.cut_after(cut)
    kept = [{"step": step, "loss": 1.0} for step in steps if step <= cut]
    assert rows(path) == kept
    resumed.write({"step": cut, "knn_top1": 0.5})
    resumed.write({"step": 61})
    if kept and kept[-1]["step"] == cut:
        kept[-1]["knn_top1"] = 0.5
    else:
        kept.append({"step": cut, "knn_top1": 0.5})
    assert rows(path) == [*kept, {"step": 61}]


def test_nothing_to_cut(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "metrics.jsonl").cut_after(3)
    assert list(tmp_path.iterdir()) == []


FILL_THE_DISK = """
import resource, sys
from pathlib import Path
from fastjepa.engine.metrics import MetricsFile
file = MetricsFile(Path(sys.argv[1]))
def write(row):
    try:
        file.write(row)
        print("written")
    except OSError as error:
        print(error.strerror)
write({"step": 1, "loss": 0.5})
resource.setrlimit(resource.RLIMIT_FSIZE, (30, resource.RLIM_INFINITY))
write({"step": 2, "loss": 0.4})
write({"step": 3, "loss": 0.3})
write({"step": 3, "knn_top1": 0.9})
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
write({"step": 4, "loss": 0.2})
write({"step": 5, "loss": 0.1})
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits on the size of files")
def test_rows_that_a_full_disk_does_not_take_wait_and_leave_no_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", FILL_THE_DISK, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["written", *["File too large"] * 3, "written", "written"]
    assert rows(path) == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.4},
        {"step": 3, "loss": 0.3, "knn_top1": 0.9},
        {"step": 4, "loss": 0.2},
        {"step": 5, "loss": 0.1},
    ]


def test_a_file_that_cannot_be_written_is_told_of_once_and_once_more_when_it_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk, path, other = Disk(RunConsole(True, "run")), tmp_path / "none" / "file", tmp_path / "none" / "other"

    def attempt(file: Path) -> bool:
        return disk.attempt(file, lambda: file.write_text(""), "training goes on")

    assert [attempt(path) for _ in range(3)] == [False, False, False]
    assert not attempt(other)
    path.parent.mkdir()
    assert [attempt(path) for _ in range(2)] == [True, True]
    path.parent.rename(tmp_path / "gone")
    assert not attempt(path)
    path.parent.mkdir()
    assert attempt(path)
    said = capsys.readouterr().out.splitlines()
    cannot = "warning: cannot write {}: No such file or directory; training goes on"
    assert said == [
        cannot.format(path),
        cannot.format(other),
        f"{path} can be written again; 3 times it could not",
        cannot.format(path),
        f"{path} can be written again; once it could not",
    ]


def test_what_to_do_about_it() -> None:
    for number in (errno.ENOSPC, errno.EDQUOT):
        assert remedy(OSError(number, "")) == "free space there, and start it again"
    assert remedy(OSError(errno.EACCES, "")).startswith("choose another run.dir")


def test_configuration_of_a_folder_is_what_ran(tmp_path: Path) -> None:
    config = load_config(None, ["optim.betas=[0.8, 0.95]", "data.crop_scale=null", "run.name=ünïcode"])
    RunFolder(tmp_path).open(config).close()
    assert load_config(tmp_path / "config.yaml") == config == parse_config(config.to_dict())

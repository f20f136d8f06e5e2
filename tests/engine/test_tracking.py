"""Runs that are tracked, read back from where they were tracked."""

import json
import logging
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fastjepa.cli import main
from fastjepa.config import Config, ConfigError, parse_config
from fastjepa.engine import tracking
from fastjepa.engine.folder import RunFolder
from fastjepa.engine.tracking import Tracking, check_tracking
from tests.conftest import TINY

if TYPE_CHECKING:
    from tests.conftest import Trainer

Rows = list[dict[str, Any]]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights & Biases without a network."""
    for name in ("WANDB_DIR", "WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values that TensorBoard would show."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run / "tensorboard"), {"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def records(file: Path) -> Iterator[bytes]:
    """Of a file of Weights & Biases: blocks of 32 KiB, of pieces with checksum, length and kind."""
    content, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last piece
            yield whole
            whole = b""


def sent_to_wandb(run: Path) -> tuple[set[str], Rows, Rows]:
    """The ids, the rows and the configurations of its offline runs."""
    protocol = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    ids, rows, configs = set(), [], []
    for file in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        for record in map(protocol.Record.FromString, records(file)):
            match record.WhichOneof("record_type"):
                case "run":
                    ids.add(record.run.run_id)
                    updates = record.run.config.update
                case "config":
                    updates = record.config.update
                case "history":
                    items = record.history.item
                    row = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
                    rows.append({key: value for key, value in row.items() if not key.startswith("_")})
                    continue
                case _:
                    continue
            configs += [{u.key or ".".join(u.nested_key): u.value_json for u in updates}]
    return ids, rows, configs


def row(step: int, **more: float) -> dict[str, float]:
    return {"step": step, "loss": 1 / step, **more}


@pytest.fixture
def config() -> Config:
    return parse_config(TINY)


@pytest.mark.slow
def test_a_tracked_run_that_is_resumed(train: "Trainer", offline: None) -> None:
    """Both have each logged step once, with the values of metrics.jsonl."""
    pytest.importorskip("tensorboard")
    pytest.importorskip("wandb")
    tracked = "run.track=[tensorboard, wandb]"
    train(tracked, "probe.every_steps=4", "run.save_every=4", "optim.steps=8", "run.log_every=1").check()
    shutil.rmtree(train.run / "checkpoints" / "step_00000008")  # as if it had been killed after step 4
    train(tracked, "probe.every_steps=4", "run.save_every=4", "optim.steps=8", "run.log_every=1").check()

    assert [row["step"] for row in train.rows] == list(range(1, 9))
    shown = scalars(train.run)
    keys = {key for row in train.rows for key in row if key != "step"}
    assert shown.keys() == keys
    assert "knn_top1" in keys
    timed = {"images_per_second", "data_wait_fraction", "elapsed_s", "judge_s", "save_s"}
    judged_anew = {"target_std"}  # of which the file keeps the second value of a step
    ids, rows, configs = sent_to_wandb(train.run)
    for key in keys:
        expected = [(row["step"], row[key]) for row in train.rows if key in row]
        assert [step for step, _ in shown[key]] == [step for step, _ in expected]
        if key not in judged_anew:
            assert [v for _, v in shown[key]] == pytest.approx([v for _, v in expected], rel=1e-6)
        sent = [(row["step"], row[key]) for row in rows if key in row]
        assert [step for step, _ in sent] == [step for step, _ in expected]
        if key not in timed | judged_anew:  # what came again is not sent again
            assert [v for _, v in sent] == pytest.approx([v for _, v in expected], rel=1e-5)
    assert len(ids) == 1
    assert any("global_batch" in str(values) for values in configs)


def test_going_back_and_on(tmp_path: Path, config: Config, offline: None) -> None:
    """TensorBoard forgets what is gone back over; Weights & Biases cannot, and takes it once."""
    pytest.importorskip("tensorboard")
    pytest.importorskip("wandb")
    with Tracking(("tensorboard", "wandb"), RunFolder(tmp_path), config) as to:
        to.cut_after(0)
        for step in (1, 2, 3):
            to.send(row(step))
        to.send({"step": 3, "knn_top1": 0.5})
        to.cut_after(1)
        for step in (2, 3, 4):
            to.send({"step": step, "loss": 7.0})
    assert scalars(tmp_path)["loss"] == [(1, 1.0), (2, 7.0), (3, 7.0), (4, 7.0)]
    _, rows, _ = sent_to_wandb(tmp_path)
    assert rows == [row(1), row(2), row(3), {"step": 3, "knn_top1": 0.5}, {"step": 4, "loss": 7.0}]


def test_a_run_is_sent_afterwards(
    train: "Trainer", capsys: pytest.CaptureFixture[str], offline: None
) -> None:
    """As often as one likes: nothing comes twice."""
    pytest.importorskip("tensorboard")
    pytest.importorskip("wandb")
    train().check()
    for _ in range(2):
        for name in ("tensorboard", "wandb"):
            assert main(["track", str(train.run), "--to", name]) == 0
            assert capsys.readouterr().out == f"Sent 3 rows of {train.run / 'metrics.jsonl'} to {name}\n"
    assert [step for step, _ in scalars(train.run)["loss"]] == [1, 5, 10]
    ids, rows, _ = sent_to_wandb(train.run)
    assert len(ids) == 1
    assert [found["step"] for found in rows] == [1, 5, 10]
    assert main(["track", str(train.home), "--to", "wandb"]) == 1
    assert f"{train.home} is no folder of a run" in capsys.readouterr().err


def test_what_fails_warns_once_and_the_other_goes_on(
    tmp_path: Path, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "good").mkdir()
    (tmp_path / "bad").write_text("a file where the folder should be")
    for where, good in ((tmp_path / "good", True), (tmp_path / "bad", False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING), Tracking(("tensorboard",), RunFolder(where), config) as to:
            to.cut_after(0)
            for step in (1, 2, 3):
                to.send(row(step))
        assert len(caplog.messages) == (0 if good else 1)
    assert "tracking with tensorboard failed" in caplog.messages[0]
    assert "fastjepa track" in caplog.messages[0]
    assert len(scalars(tmp_path / "good")["loss"]) == 3


class _Stuck:
    """A tracker whose server does not answer."""

    def __init__(self, *_: object) -> None:
        self.answered = threading.Event()

    def cut_after(self, step: int) -> None: ...

    def send(self, row: object) -> None:
        self.answered.wait(60)

    def close(self) -> None: ...


def test_a_server_that_does_not_answer_keeps_nothing_waiting(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(tracking.OPEN, "wandb", _Stuck)
    monkeypatch.setattr(tracking, "PATIENCE_S", 0.2)
    begin_s = time.monotonic()
    with caplog.at_level(logging.WARNING), Tracking(("wandb",), RunFolder(tmp_path), config) as to:
        to.cut_after(0)
        for step in range(1, 100):
            to.send(row(step))
    assert time.monotonic() - begin_s < 30
    assert "not all was sent within 0.2 s" in caplog.text


TO_NOBODY = """
import sys
from pathlib import Path
from fastjepa.config import parse_config
from fastjepa.engine import tracking
from fastjepa.engine.folder import RunFolder

tracking.PATIENCE_S = 0.5
config = parse_config({"data": {"name": "fashion_mnist"}})
tracking.check_tracking(("wandb",))
with tracking.Tracking(("wandb",), RunFolder(Path(sys.argv[1])), config) as to:
    to.cut_after(0)
    to.send({"step": 1, "loss": 1.0})
"""


def test_a_server_that_is_away_neither_refuses_a_run_nor_keeps_it_from_ending(tmp_path: Path) -> None:
    """The server is not asked before the run, and Weights & Biases itself would wait for it for 90 s."""
    pytest.importorskip("wandb")
    away = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_SILENT": "true"}
    environment = {name: text for name, text in os.environ.items() if not name.startswith("WANDB_")} | away
    done = subprocess.run(
        [sys.executable, "-c", TO_NOBODY, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=75,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("tracking with wandb failed") == 1
    assert "Traceback" not in done.stderr


def test_nothing_of_the_machine_is_sent(
    tmp_path: Path, config: Config, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name in ("USER", "LOGNAME", "USERNAME", "HOSTNAME"):
        monkeypatch.setenv(name, "somebody-here")
    monkeypatch.setattr(socket, "gethostname", lambda: "somebody-here")
    with Tracking(("wandb",), RunFolder(tmp_path), config) as to:
        to.cut_after(0)
        to.send(row(1))
    [folder] = (tmp_path / "wandb").glob("offline-run-*")
    [file] = folder.glob("*.wandb")
    sent = b"".join(records(file))
    for told in (sys.executable, sys.argv[0], "somebody-here"):
        assert told.encode() not in sent
    protocol = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    found = [protocol.Record.FromString(record) for record in records(file)]
    assert [record.run.host for record in found if record.WhichOneof("record_type") == "run"] == [""]
    assert not any(record.WhichOneof("record_type") == "environment" for record in found)
    assert not (folder / "files" / "requirements.txt").exists()


def test_nobody_tracks_by_default(tmp_path: Path, config: Config) -> None:
    with Tracking(config.run.track, RunFolder(tmp_path), config) as to:
        to.cut_after(0)
        to.send(row(1))
    assert list(tmp_path.iterdir()) == []
    assert config.run.track == ()


def test_a_package_that_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fastjepa\[tracking\]'"):
        check_tracking(("tensorboard",))
    check_tracking(())


def test_without_a_login_it_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    import wandb

    wandb.teardown()
    with pytest.raises(ConfigError, match="wandb login"):
        check_tracking(("wandb",))
    wandb.teardown()


def test_names_that_are_none() -> None:
    with pytest.raises(ConfigError, match="one of tensorboard, wandb"):
        parse_config({"run": {"track": ["tensorbord"]}})
    with pytest.raises(ConfigError, match="must be a list of names"):
        parse_config({"run": {"track": "wandb"}})

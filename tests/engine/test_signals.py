"""Launchers, and what ends a run of several processes."""

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fastjepa.engine.stopping import Call, StopRequest

if TYPE_CHECKING:
    from tests.conftest import Trainer

LONG = "optim.steps=5000"  # it does not get there

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def ranks_below(pid: int) -> list[int]:
    """The processes of a launcher that train, in the order they were started."""
    found = []
    for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        command = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
        # The launchers of deepspeed have the script among their arguments as well.
        trains = any(word.endswith(b"train.py") for word in command[1:3])
        found += [child] if trains else ranks_below(child)
    return found


def assert_gone(pids: list[int]) -> None:
    deadline_s = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline_s, "it left processes behind"
        time.sleep(0.05)


def test_deepspeed_launcher_and_a_signal_to_one_rank(train: "Trainer") -> None:
    process = train.start(LONG, launcher=("deepspeed", "--num_gpus", "2", "--master_port", free_port()))
    train.wait_for(process, step=10)
    ranks = ranks_below(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGTERM)
    stopped = train.finish(process).check()
    assert_gone(ranks)
    step = train.saved_steps[-1]
    assert stopped.out.count(f"Stopped at step {step} of 5000") == 1
    assert not list(train.run.rglob("*.tmp"))


def test_a_dead_rank_ends_the_others(train: "Trainer") -> None:
    process = train.start(LONG, launcher=("torchrun", "--standalone", "--nproc-per-node", "2"))
    train.wait_for(process, step=5)
    ranks = ranks_below(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    assert train.finish(process).code != 0
    assert_gone(ranks)


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    }
    yield StopRequest()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_asks_to_save_and_stop(stop: StopRequest, number: signal.Signals) -> None:
    calls = [stop.call]
    # Schedulers send SIGTERM again, more impatiently.
    for sent in (number, signal.SIGTERM):
        os.kill(os.getpid(), sent)
        calls.append(stop.call)
    assert calls == [Call.GO_ON, Call.SAVE_AND_STOP, Call.SAVE_AND_STOP]


def test_a_second_ctrl_c_interrupts(stop: StopRequest) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_interrupted_while_starting(train: "Trainer") -> None:
    """Before there is anything to save: no traceback, and the exit status of Ctrl-C."""
    process = train.start(LONG, "probe.final_bank=280", "probe.final_queries=9720")
    while not (train.run / "config.yaml").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    ended = train.finish(process).check(130)
    assert train.saved_steps == []
    assert train.rows == []
    assert ended.err in ("", "interrupted\n")

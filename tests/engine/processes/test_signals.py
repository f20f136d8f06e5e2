"""Launchers, and what ends a run of several processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fastjepa.engine.processes.stopping import Call, StopRequest
from fastjepa.signals import STOPPING
from tests.engine.processes.test_world import listening
from tests.ranks import free_port

if TYPE_CHECKING:
    from tests.conftest import Finished, Trainer

HARM = Path(__file__).parents[2] / "faults" / "harm.py"
LONG = "optim.steps=5000"  # it does not get there

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


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


def start_two(train: "Trainer", *overrides: str) -> list[subprocess.Popen[str]]:
    """Two ranks that nothing but their environment holds together."""
    port = free_port()
    return [
        train.start(
            *overrides,
            launcher=(
                *("env", f"RANK={rank}", "WORLD_SIZE=2", f"LOCAL_RANK={rank}"),
                *("MASTER_ADDR=127.0.0.1", f"MASTER_PORT={port}", sys.executable),
            ),
        )
        for rank in range(2)
    ]


def below(pid: int) -> list[int]:
    """The processes that a process has started, and they in turn."""
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [found for child in children for found in (child, *below(child))]


LAUNCHERS = {
    "deepspeed": ("deepspeed", "--num_gpus", "2"),
    "torchrun": ("torchrun", "--standalone", "--nproc-per-node", "2"),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_signal_to_one_rank_of_a_launcher(train: "Trainer", launcher: str) -> None:
    port = ("--master_port", str(free_port())) if launcher == "deepspeed" else ()
    process = train.start(LONG, launcher=(*LAUNCHERS[launcher], *port))
    train.wait_for(process, step=10)
    ranks = ranks_below(process.pid)
    assert len(ranks) == 2
    for _ in range(2):  # the second must not lose the save
        os.kill(ranks[1], signal.SIGTERM)
    assert_gone(ranks)
    stopped = train.finish(process).check()
    step = train.saved_steps[-1]
    assert stopped.out.count(f"Stopped at step {step} of 5000") == 1
    assert (train.run / "stopped").read_text() == f"Stopped at step {step} of 5000\n"
    assert not list(train.run.rglob("*.tmp"))


def test_a_dead_rank_is_named_and_ends_the_others(train: "Trainer") -> None:
    process = train.start(LONG, "speed.workers=1", launcher=LAUNCHERS["torchrun"])
    train.wait_for(process, step=5)
    everything, ranks = below(process.pid), ranks_below(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    ended = train.finish(process)
    assert ended.code != 0
    assert_gone(everything)
    assert [line for line in ended.errors if line.startswith("error: rank 1 (")] == ended.errors != []
    assert f"process {ranks[1]}) has ended without a word" in ended.errors[0]


@pytest.mark.slow_fault
def test_a_stopped_rank_is_named_and_ends_once_it_goes_on(train: "Trainer") -> None:
    """Without a launcher nobody else ends it. Until then neither rank was reachable from another host."""
    ranks = start_two(train, LONG, "speed.workers=1", "run.dead_after_s=8")
    train.wait_for(ranks[0], step=100)  # its watch has told that it is no longer starting
    for rank in ranks:
        assert listening(rank.pid) == {"0100007F"}
    first_workers, second_workers = below(ranks[0].pid), below(ranks[1].pid)
    ranks[1].send_signal(signal.SIGSTOP)
    first = train.finish(ranks[0]).check(1)
    assert [line for line in first.errors if line.startswith("error: rank 1 (")] == first.errors != []
    assert f"process {ranks[1].pid}) has not been heard from for more than 8 s" in first.errors[0]
    assert_gone(first_workers)
    ranks[1].send_signal(signal.SIGCONT)
    assert train.finish(ranks[1]).code == 1
    assert_gone(second_workers)


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    handlers = {number: signal.getsignal(number) for number in (*STOPPING, signal.SIGINT)}
    stop = StopRequest()
    stop.remember(launched=False)
    yield stop
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [*STOPPING, signal.SIGINT])
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


def test_a_ctrl_c_that_a_launcher_passes_on_is_no_second_one(stop: StopRequest) -> None:
    stop.remember(launched=True)
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.call == Call.SAVE_AND_STOP


def told_while_it_waits_for_the_others(train: "Trainer", number: signal.Signals) -> "Finished":
    process = train.start(
        LONG,
        launcher=(
            *("env", "RANK=0", "WORLD_SIZE=2", "LOCAL_RANK=0"),
            *("MASTER_ADDR=127.0.0.1", f"MASTER_PORT={free_port()}", sys.executable),
        ),
    )
    while not listening(process.pid):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    return train.finish(process, timeout_s=30)


@pytest.mark.parametrize("number", STOPPING)
def test_told_to_stop_while_it_is_imported(train: "Trainer", number: signal.Signals) -> None:
    process = train.start(LONG)
    while not blocks(process.pid, number):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(number)
    stopped = train.finish(process).check()
    assert stopped.out == "Stopped before it began; the same command starts it.\n"
    assert (train.run / "stopped").read_text() == "Stopped before it began\n"


def blocks(pid: int, number: signal.Signals) -> bool:
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(status["SigBlk"], 16) >> (number - 1) & 1)


def test_nohup_is_heeded(train: "Trainer") -> None:
    process = train.start("optim.steps=100", launcher=("nohup", sys.executable))
    train.wait_for(process, step=10)
    process.send_signal(signal.SIGHUP)
    train.finish(process).check()
    assert train.saved_steps[-1] == 100


def test_told_to_stop_while_it_joins_the_others(train: "Trainer") -> None:
    """Then it is known to them, and they stop with it."""
    process = train.start(LONG, launcher=(*LAUNCHERS["torchrun"], str(HARM), "told", "1"))
    stopped = train.finish(process).check()
    assert "Stopped at step 0 of 5000; the same command resumes." in stopped.out
    assert (train.run / "stopped").read_text() == "Stopped at step 0 of 5000\n"


def test_interrupted_while_it_waits_for_the_others(train: "Trainer") -> None:
    assert told_while_it_waits_for_the_others(train, signal.SIGINT).check(130).err == "interrupted\n"
    assert not train.run.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_told_to_stop_while_it_waits_for_the_others(train: "Trainer", number: signal.Signals) -> None:
    ended = told_while_it_waits_for_the_others(train, number).check()
    assert ended.out == "Stopped before it began; the same command starts it.\n"
    assert ended.err == ""
    assert [path.name for path in train.run.iterdir()] == ["stopped"]
    assert train("optim.steps=5").check().out  # what is there is in nobody's way
    assert not (train.run / "stopped").exists()


def test_interrupted_while_it_judges_what_it_starts_from(train: "Trainer") -> None:
    """Before there is anything to save: no traceback, and the exit status of Ctrl-C."""
    process = train.start(LONG, "probe.final_bank=280", "probe.final_queries=9720")
    while not (train.run / "config.yaml").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    ended = train.finish(process).check(130)
    assert train.saved_steps == []
    assert train.rows == []
    assert ended.err == ""

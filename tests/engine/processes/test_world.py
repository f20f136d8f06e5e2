"""How the processes of a run find each other, whatever started them, and what they listen on."""

import re
import socket
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from fastjepa.config import ConfigError
from fastjepa.engine.processes.launchers import Placement, expand_hosts, find_placement
from fastjepa.engine.processes.rendezvous import interface_of, meet, own_address
from fastjepa.engine.processes.stopping import StoppedEarly
from tests.ranks import free_port

if TYPE_CHECKING:
    from tests.conftest import Trainer

SRUN = {
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_NODELIST": "gpu[08-09]",
    "SLURM_JOB_ID": "123456",
}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "gpu08",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "1",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Placement("python")),
        ({"MASTER_ADDR": "left", "MASTER_PORT": "over", "SLURM_NTASKS": "8"}, Placement("python")),
        (TORCHRUN, Placement("torchrun", 3, 4, 1, 2, "gpu08", 29500, agent_store=True, attempt=2)),
        (SRUN, Placement("srun", 9, 16, 1, None, "gpu08", 15000 + 123456 % 15000)),
        (SRUN | {"MASTER_ADDR": "a", "MASTER_PORT": "5"}, Placement("srun", 9, 16, 1, None, "a", 5)),
        # A step of one task in a job of many.
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Placement("srun")),
        (SRUN | TORCHRUN, Placement("torchrun", 3, 4, 1, 2, "gpu08", 29500, agent_store=True, attempt=2)),
        (
            SRUN | MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_PORT": "29500"},
            Placement("mpirun", 1, 2, 1, 2, "127.0.0.1", 29500),
        ),
        (
            MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "prterun-gpu08-4711@1"},
            Placement("mpirun", 1, 2, 1, 2, "127.0.0.1", 15000 + 0x7367AB5E % 15000),
        ),
        (MPIRUN | {"MASTER_ADDR": "a", "MASTER_PORT": "5"}, Placement("mpirun", 1, 2, 1, None, "a", 5)),
    ],
)
def test_launchers_are_understood(environment: dict[str, str], expected: Placement) -> None:
    assert find_placement(environment) == expected


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (without(TORCHRUN, "MASTER_ADDR", "LOCAL_RANK"), "RANK is set, but LOCAL_RANK and MASTER_ADDR not"),
        (without(TORCHRUN, "WORLD_SIZE"), "WORLD_SIZE is not set"),
        (without(TORCHRUN, "RANK"), "WORLD_SIZE is 4, but RANK is not set"),
        (TORCHRUN | {"WORLD_SIZE": "four"}, "WORLD_SIZE must be a whole number, got 'four'"),
        (TORCHRUN | {"RANK": "4"}, "no rank 4 of 4 processes; ranks are 0 to 3"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "local rank 2 is not one of 2"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT must be from 1 to 65535"),
        (SRUN | {"WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but srun started 16 tasks"),
        (without(SRUN, "SLURM_JOB_NODELIST"), "neither SLURM_JOB_NODELIST nor MASTER_ADDR is set"),
        (without(SRUN, "SLURM_LOCALID"), "SLURM_LOCALID is not set"),
        (SRUN | {"SLURM_JOB_NODELIST": "gpu[8-"}, "no list of hosts"),
        (MPIRUN, "mpirun does not say where rank 0 can be reached"),
        # Of several hosts only one would know the port.
        (MPIRUN | {"MASTER_ADDR": "a", "PMIX_NAMESPACE": "1"}, "-x MASTER_PORT=<a free port there>"),
        (MPIRUN | {"MASTER_ADDR": "a", "MASTER_PORT": "b"}, "MASTER_PORT must be a whole number, got 'b'"),
    ],
)
def test_half_an_environment_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        find_placement(environment)


def test_hosts_as_slurm_writes_them() -> None:
    assert expand_hosts("gpu[08-10,12],login") == ["gpu08", "gpu09", "gpu10", "gpu12", "login"]
    assert expand_hosts("r[1-2]n[7,9]-ib") == ["r1n7-ib", "r1n9-ib", "r2n7-ib", "r2n9-ib"]
    assert expand_hosts("") == []
    for wrong in ("gpu[", "gpu]1", "gpu[a-b]", "gpu[1-]", "a,,b", ","):
        with pytest.raises(ConfigError, match="Slurm"):
            expand_hosts(wrong)


NAMES = st.text("abc-.", min_size=1, max_size=4)
RANGES = st.lists(st.tuples(st.integers(0, 120), st.integers(0, 5)), min_size=1, max_size=4)


@given(st.lists(st.tuples(NAMES, st.integers(1, 4), RANGES, NAMES), max_size=4))
def test_every_host_of_a_list_is_found_in_order(
    groups: Sequence[tuple[str, int, list[tuple[int, int]], str]],
) -> None:
    written, expected = [], []
    for before, digits, ranges, after in groups:
        parts = []
        for first, more in ranges:
            low, high = str(first).zfill(digits), str(first + more).zfill(digits)
            parts.append(f"{low}-{high}" if more else low)
            expected += [f"{before}{str(n).zfill(digits)}{after}" for n in range(first, first + more + 1)]
        written.append(f"{before}[{','.join(parts)}]{after}")
    assert expand_hosts(",".join(written)) == expected


def local(rank: int, port: int, size: int = 2, address: str = "127.0.0.1") -> Placement:
    return Placement("test", rank, size, rank, None, address, port)


def test_all_ranks_meet() -> None:
    port = free_port()
    with ThreadPoolExecutor() as threads:
        met = list(threads.map(lambda rank: meet(local(rank, port, 3), 20), range(3)))
    assert [member.rank for member in met[2].members] == [0, 1, 2]
    assert {meeting.members for meeting in met} == {met[0].members}
    assert {meeting.address for meeting in met} == {"127.0.0.1"}


def test_who_does_not_come_is_named() -> None:
    port = free_port()
    with ThreadPoolExecutor() as threads:
        first = threads.submit(meet, local(0, port, 3), 2)
        second = threads.submit(meet, local(1, port, 3), 2)
        for waiting in (first, second):
            with pytest.raises(ConfigError, match=f"1 of 3 ranks did not join in time: 2.*127.0.0.1:{port}"):
                waiting.result()


def test_ranks_that_disagree_are_named() -> None:
    port = free_port()
    with ThreadPoolExecutor() as threads:
        first = threads.submit(meet, local(0, port, 2), 5)
        second = threads.submit(meet, local(1, port, 4), 5)
        for waiting in (first, second):
            with pytest.raises(ConfigError, match=r"WORLD_SIZE is 4 for rank 1 \(.*, and 2 for rank 0"):
                waiting.result()


def test_unreachable_addresses_are_named() -> None:
    port = free_port()
    with pytest.raises(ConfigError, match=f"cannot reach rank 0 at 127.0.0.1:{port}.*refused.*firewall"):
        meet(local(1, port), 0.3)
    with pytest.raises(ConfigError, match=r"MASTER_ADDR no-such-host\.invalid has no address.*getent hosts"):
        meet(local(1, port, address="no-such-host.invalid"), 0.3)
    with pytest.raises(ConfigError, match=r"rank 0 cannot listen on 192\.0\.2\.1.*no address of this host"):
        meet(local(0, port, address="192.0.2.1"), 0.3)
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(ConfigError, match=r"the port is in use.*another MASTER_PORT"):
            meet(local(0, port), 0.3)
        with pytest.raises(ConfigError, match=r"does not do so as rank 0 does.*another program's"):
            meet(local(1, port), 1)
    several_hosts = Placement("test", 0, 4, 0, 2, "127.0.0.1", port)
    with pytest.raises(ConfigError, match="which no other host can reach: set MASTER_ADDR to"):
        meet(several_hosts, 0.3)
    with pytest.raises(ConfigError, match=r"which no other host can reach: start torchrun.*--local-addr"):
        meet(replace(several_hosts, agent_store=True), 0.3)


def test_the_interface_of_an_address() -> None:
    assert own_address("127.0.0.1", 80) == "127.0.0.1"
    assert interface_of("127.0.0.1") in {name for _, name in socket.if_nameindex()}
    assert interface_of("192.0.2.1") is None


@pytest.mark.skipif(sys.platform != "linux", reason="looks for sockets in /proc")
def test_one_process_listens_nowhere(train: "Trainer") -> None:
    process = train.start("optim.steps=5000", "speed.workers=1")
    train.wait_for(process, step=1)
    assert listening(process.pid) == set()
    process.terminate()
    train.finish(process).check()


def test_a_signal_while_the_store_is_made_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python would end the thread as soon as it came back from C++, and that aborts the process."""
    start, store, made = threading.Thread.start, dist.TCPStore, threading.Event()

    def start_and_stop(thread: threading.Thread) -> None:
        start(thread)
        monkeypatch.setattr(threading.Thread, "start", start)
        raise StoppedEarly

    def make_slowly(*args: Any, **settings: Any) -> dist.TCPStore:
        time.sleep(0.3)
        result = store(*args, **settings)
        made.set()
        return result

    monkeypatch.setattr(threading.Thread, "start", start_and_stop)
    monkeypatch.setattr(dist, "TCPStore", make_slowly)
    with pytest.raises(StoppedEarly):
        meet(Placement("python", 0, 2, 0, None, "127.0.0.1", free_port()), 30)
    assert made.is_set()


def listening(pid: int) -> set[str]:
    """Addresses on which a process listens, in the kernel's hexadecimal."""
    files = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it was open a moment ago
            files.append(fd.readlink().name)
    inodes = {name[len("socket:[") : -1] for name in files if name.startswith("socket:[")}
    found = set()
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = row.split()
            if fields[3] == "0A" and fields[9] in inodes:  # TCP_LISTEN
                found.add(fields[1].partition(":")[0])
    return found

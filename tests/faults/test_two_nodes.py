"""Two nodes on one machine: network namespaces with names and addresses of their own, and a cable between."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.faults.evidence import RUN, Watched, ranks_of
from tests.faults.processes import assert_gone, descendants, needs_proc, ranks_below
from tests.faults.table import Row

pytestmark = [needs_proc, pytest.mark.slow_fault]

DEAD_AFTER_S = 10
ADDRESSES = ("10.83.0.1", "10.83.0.2")  # seen by nobody outside

# As srun would: two tasks on each of the nodes $1 and $2, with what Slurm tells them.
SRUN = f"""
nodes=("$1" "$2"); shift 2
for task in 0 1 2 3; do
    node=${{nodes[task / 2]}}
    SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) SLURM_NTASKS=4 SLURM_JOB_ID=7 \\
        SLURM_JOB_NODELIST="${{nodes[0]}},${{nodes[1]}}" MASTER_ADDR={ADDRESSES[0]} \\
        ip netns exec "$node" unshare --uts sh -c 'hostname "$0"; exec "$@"' "$node" "$@" &
    tasks+=($!)
done
status=0
for task in "${{tasks[@]}}"; do wait "$task" || status=$?; done
exit $status
"""


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


@dataclass(frozen=True)
class Nodes:
    """Two namespaces; `cable` is the second's end of what joins them."""

    names: tuple[str, str]
    cable: str = "eth0"

    @property
    def launcher(self) -> tuple[str, ...]:
        return ("bash", "-c", SRUN, "srun", *self.names, sys.executable)

    def plug(self, is_in: bool) -> None:
        ip("-n", self.names[1], "link", "set", self.cable, "up" if is_in else "down")

    def processes(self) -> list[int]:
        return [int(pid) for name in self.names for pid in ip("netns", "pids", name).split()]


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("needs ip and unshare (Debian, Ubuntu: iproute2, util-linux)")
    made = Nodes((f"node-a-{os.getpid()}", f"node-b-{os.getpid()}"))
    try:
        try:
            for name in made.names:
                ip("netns", "add", name)
            first, second = made.names
            ip("-n", first, "link", "add", "eth0", "type", "veth", "peer", "eth0", "netns", second)
            for name, address in zip(made.names, ADDRESSES, strict=True):
                ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
                for interface in ("lo", "eth0"):
                    ip("-n", name, "link", "set", interface, "up")
            subprocess.run(["unshare", "--uts", "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        yield made
    finally:
        for name in made.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def listening(node: str) -> set[str]:
    """Addresses on which anything in a namespace listens."""
    rows = [
        row.split()
        for row in ip("netns", "exec", node, "cat", "/proc/net/tcp", "/proc/net/tcp6").splitlines()
    ]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A"}  # TCP_LISTEN


def test_a_node_that_is_cut_off(
    watched: Watched,
    nodes: Nodes,
    uninterrupted: Callable[..., Watched],
    table: Callable[[str, str], Row],
) -> None:
    row = table(
        "the network between two nodes is cut", "all ranks end in seconds, naming one of the other side"
    )
    settings = (*RUN, f"run.dead_after_s={DEAD_AFTER_S}")
    process = watched.start(*settings, launcher=nodes.launcher, gates=[40])
    with watched.standing_at(process, 40):
        everything, ranks = descendants(process.pid), ranks_below(process.pid)
        assert len(ranks) == 4
        # In the kernel's hexadecimal: nothing listens on all interfaces.
        assert listening(nodes.names[0]) == {"0100530A"}
        assert listening(nodes.names[1]) == {"0200530A"}
        nodes.plug(is_in=False)
    row.times += 1
    began_s = time.monotonic()
    ended = watched.trainer.finish(process)
    assert time.monotonic() - began_s < DEAD_AFTER_S + 10
    assert ended.code != 0
    assert_gone(everything)
    assert nodes.processes() == []
    # Rank 0 judges the others, and they judge rank 0, each for its own side.
    first, second = nodes.names
    named = sorted(line.split(",")[0].removeprefix("error: ") for line in ended.errors)
    assert named[:2] == [f"rank 0 ({first}"] * 2
    assert named[2:] in ([f"rank {rank} ({second}"] * 2 for rank in (2, 3)), "both were silent as long"
    assert all(f"not been heard from for more than {DEAD_AFTER_S} s" in line for line in ended.errors)

    nodes.plug(is_in=True)
    resumed = watched(*settings, launcher=nodes.launcher).check()
    assert "Resuming at step" in resumed.out
    row.hold_against(watched, uninterrupted(*RUN, launcher=ranks_of(4)))

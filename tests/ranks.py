"""Scripts as the ranks of one run: real processes, real gloo."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    """One that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(count: int, script: str, *arguments: str, timeout_s: float) -> list[str]:
    """Run `python script arguments…` as each of `count` ranks to its end; what each has printed.

    They see the packages of this tree, and none outlives the call.
    """
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    processes = [
        subprocess.Popen(
            [sys.executable, script, *arguments],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        printed = []
        for process in processes:
            output, _ = process.communicate(timeout=timeout_s)
            assert process.returncode == 0, output
            printed.append(output)
        return printed
    finally:
        for process in processes:
            process.kill()

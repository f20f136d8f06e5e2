"""Scripts as the ranks of one run: real processes, real gloo.

    python ranks.py RANKS script [arguments …]

starts them, hands signals on to all, and ends as the first that failed: what `srun` does on one machine. It
does not import torch, for which `torchrun` takes as long as a rank.
"""

import os
import signal
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


def environments(count: int) -> list[dict[str, str]]:
    """This process's, once for each rank of one run."""
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def run_ranks(count: int, script: str, *arguments: str, timeout_s: float) -> list[str]:
    """Run `python script arguments…` as each of `count` ranks to its end; what each has printed.

    They see the packages of this tree, and none outlives the call.
    """
    common = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    processes = [
        subprocess.Popen(
            [sys.executable, script, *arguments],
            env=of_rank | common,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for of_rank in environments(count)
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


def main() -> int:
    """As the module says."""
    count, *script = sys.argv[1:]
    started = [
        subprocess.Popen([sys.executable, *script], env=of_rank) for of_rank in environments(int(count))
    ]

    def hand_on(number: int, _frame: object) -> None:
        for one in started:
            one.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, hand_on)
    return next(filter(None, [one.wait() for one in started]), 0)


if __name__ == "__main__":
    sys.exit(main())

"""Start a script as the ranks of one run, hand signals on to all of them, and end as the first that failed.

python start.py RANKS script [arguments …]

What `srun` does on one machine. It does not import torch, which takes `torchrun` as long as it takes a rank.
"""

import os
import signal
import socket
import subprocess
import sys


def main() -> int:
    ranks = int(sys.argv[1])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {"WORLD_SIZE": sys.argv[1], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, *sys.argv[2:]], env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(ranks)
    ]

    def hand_on(number: int, _frame: object) -> None:
        for one in started:
            one.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, hand_on)
    return next(filter(None, [one.wait() for one in started]), 0)


if __name__ == "__main__":
    sys.exit(main())

"""Measure what the watch over the other ranks costs rank 0: time of a core, and of the thread that trains.

python -m bench.watch
python -m bench.watch --sizes 2 256 1024 --rounds 5 --seconds 3

Rank 0 is real. One process plays all the others, each of which beats once a second; their hosts are not
measured. Rank 0's main thread does small operations of torch, one after another: what is left of them is what
the watch, by the lock of the interpreter, leaves of a step that launches kernels.
"""

import argparse
import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from bench.kernels import machine
from bench.kernels.results import RESULTS
from bench.throughput.report import write
from fastjepa.engine.processes.activity import Activity, Doing
from fastjepa.engine.processes.door import hello
from fastjepa.engine.processes.files import allow_files
from fastjepa.engine.processes.rendezvous import Meeting, Member
from fastjepa.engine.processes.watch import Host
from fastjepa.engine.processes.wire import encode

SETTLE_S = 2.0
LIMIT_S = 1e6  # nobody is given up


def play(address: str, port: int, token: str, size: int) -> None:
    """All ranks but 0, their beats spread over the second."""
    allow_files(size)
    sockets = []
    for rank in range(1, size):
        sockets.append(socket.create_connection((address, port)))
        sockets[-1].sendall(hello(token, rank))
    began_s, moves = time.monotonic(), 0
    while True:
        moves += 1
        place = "conv.py:123 in forward"
        beat = {"step": moves, "doing": "computing", "moves": moves, "place": place, "in_collective": False}
        line = encode(beat)
        for i, connection in enumerate(sockets):
            connection.sendall(line)
            time.sleep(max(0.0, began_s + moves - 1 + (i + 1) / len(sockets) - time.monotonic()))


def stand(size: int, seconds: float, told: Connection) -> None:
    """Rank 0 of so many, in a process of its own."""
    torch.set_num_threads(1)
    allow_files(size)
    store = dist.HashStore()
    meeting = Meeting(store, tuple(Member(rank, "here", rank) for rank in range(size)), "127.0.0.1")
    activity = Activity()
    host = Host(meeting, activity, LIMIT_S, LIMIT_S)
    host.start()
    address, port, token = json.loads(store.get("watch"))
    forked = multiprocessing.get_context("fork")
    others = forked.Process(target=play, args=(address, port, token, size), daemon=True)
    others.start()
    ones, done = torch.ones(8), 0
    time.sleep(SETTLE_S + size / 500)
    assert host._thread.ident is not None
    clock = time.pthread_getcpuclockid(host._thread.ident)
    before = sum(peer.moment.moves for peer in host.peers[1:])
    began_s, busy_s = time.monotonic(), time.clock_gettime(clock)
    activity.begin(Doing.COMPUTING, 1, 0)
    while (passed_s := time.monotonic() - began_s) < seconds:
        for _ in range(100):
            ones.mul_(1)
        done += 100
    busy_s = time.clock_gettime(clock) - busy_s
    beats = sum(peer.moment.moves for peer in host.peers[1:]) - before
    heard = sum(peer.moment.moves > 0 for peer in host.peers)
    others.kill()
    told.send((heard, busy_s / passed_s, beats / passed_s, done / passed_s))
    os._exit(0)


def measure(size: int, seconds: float) -> tuple[float, float, float]:
    """The share of a core that the watch takes, and beats and the main thread's operations in a second."""
    spawned = multiprocessing.get_context("spawn")
    ours, theirs = spawned.Pipe()
    process = spawned.Process(target=stand, args=(size, seconds, theirs))
    process.start()
    theirs.close()
    heard, *found = ours.recv()
    process.join()
    assert heard == size, f"{heard} of {size} ranks were heard"
    share, beats, operations = found
    return share, beats, operations


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.watch", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 64, 256, 1024], help="numbers of ranks")
    parser.add_argument("--rounds", type=int, default=5, help="of all sizes, of which the median counts")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    facts = machine.facts(torch.device("cpu")) | {"load_before": os.getloadavg()[0]}
    rounds = [{size: measure(size, options.seconds) for size in options.sizes} for _ in range(options.rounds)]
    summary = {}
    for size in options.sizes:
        of_first = [of[size][2] / of[options.sizes[0]][2] for of in rounds]
        summary[size] = {
            "core_share": median(of[size][0] for of in rounds),
            # The process that plays the others may itself be late; this does not depend on it.
            "microseconds_per_beat": median(1e6 * of[size][0] / of[size][1] for of in rounds),
            "beats_per_second": median(of[size][1] for of in rounds),
            "operations_per_second": median(of[size][2] for of in rounds),
            "operations_ratio_to_first": median(of_first),
        }
        print(size, *(f"{name} {value:.4g}" for name, value in summary[size].items()))
    content = facts | {"load_after": os.getloadavg()[0], "summary": summary, "rounds": rounds}
    path = options.results / "cpu" / f"watch-{facts['date']}.json"
    write(path, json.dumps(content, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

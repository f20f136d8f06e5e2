"""Finding the processes of a run, and waiting for them to be gone."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


def children(pid: int) -> list[int]:
    """Of all threads of a process; none of one that is gone."""
    while is_alive(pid):
        try:
            tasks = Path(f"/proc/{pid}/task").glob("*/children")
            return [int(child) for task in tasks for child in task.read_text().split()]
        except OSError:  # a thread has just ended, and its children are another's now
            continue
    return []


def descendants(pid: int) -> list[int]:
    below = children(pid)
    return below + [further for child in below for further in descendants(child)]


def ranks_below(pid: int) -> list[int]:
    """The processes of a launcher that train, in the order they were started."""
    found = []
    for child in children(pid):
        command = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
        # The launchers of deepspeed have the script among their arguments as well, further back.
        scripts = [word.rpartition(b"/")[2] for word in command[1:3]]
        is_rank = any(script in (b"train.py", b"witness.py", b"harm.py") for script in scripts)
        found += [child] if is_rank else ranks_below(child)
    return found


def is_alive(pid: int) -> bool:
    """Zombies are not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def commands() -> dict[int, str]:
    """Of all processes, the arguments with spaces between them."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it is gone
            found[int(folder.name)] = (
                (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            )
    return found


def assert_gone(pids: Iterable[int], timeout_s: float = 60) -> None:
    deadline_s = time.monotonic() + timeout_s
    while alive := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline_s, f"it left processes behind: {alive}"
        time.sleep(0.05)


def end_all(pids: Iterable[int]) -> None:
    """Whatever a failed test has left."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

"""Work in other processes, its results in order.

A thin layer over torch's DataLoader, for what a long run on a cluster meets: signals sent to
every process of a job must not end the workers before the trainer has saved, and a worker that
hangs must be named, and must not outlive the run.
"""

import atexit
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Item = TypeVar("Item")
Result = TypeVar("Result")

# The trainer decides when to stop, and then tells the workers.
_IGNORED_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")

# fork: a worker is there at once and has nothing to import. forkserver would put a process between
# the two that does die of SIGTERM. Outside Linux fork is not safe.
_START_METHOD = "fork" if sys.platform == "linux" else "spawn"

_STOP_GRACE_S = 2.0

# The board is what the workers and the main process share: int64 [workers, 3].
_PID, _AT, _STOP = range(3)
_IDLE = -1
_my_row: Tensor | None = None  # of the board, in a worker process

_open: WeakSet[Generator[Any, None, None]] = WeakSet()


@atexit.register
def _close_what_is_open() -> None:
    # Python would wait at exit, for ever, for processes that ignore SIGTERM. What is registered
    # last runs first, and multiprocessing, which does the waiting, is imported above.
    for results in list(_open):
        results.close()


class _Stopped(Exception):
    """Ends a worker's item early: its result is not wanted any more."""


def note(at: int) -> None:
    """Leave word of what this worker is at, a number >= 0: if it hangs there, the error says so."""
    if _my_row is not None:
        if _my_row[_STOP]:
            raise _Stopped
        _my_row[_AT] = at


class _Work(Dataset[Result], Generic[Item, Result]):
    def __init__(self, work: Callable[[Item], Result]) -> None:
        self.work = work

    def __getitem__(self, item: Any) -> Result:
        try:
            return self.work(item)
        finally:
            if _my_row is not None:
                _my_row[_AT] = _IDLE


def _begin_worker(worker: int, board: Tensor) -> None:
    global _my_row
    for name in _IGNORED_SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    _my_row = board[worker]
    _my_row[_PID] = os.getpid()


def in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    describe: Callable[[int], str],
    timeout_s: float,
    pin_memory: bool = False,
) -> Generator[Result, None, None]:
    """`work(item)` for each item, in the order of the items.

    Args:
        work: what to do; with workers it must pickle where processes cannot be forked.
        items: taken in the main process, a little ahead of the results.
        workers: processes, each of one thread; 0 does the work here.
        describe: turns the last `note` of a worker that hangs into words.
        timeout_s: how long to wait for a result.
        pin_memory: hand out `result.pin_memory()`, made in a thread beside the main one.

    Raises:
        TimeoutError: no result in time; names the workers that hang, which are then killed.
    """
    results = _in_order(work, items, workers, describe, timeout_s, pin_memory)
    _open.add(results)
    return results


def _in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    describe: Callable[[int], str],
    timeout_s: float,
    pin_memory: bool,
) -> Generator[Result, None, None]:
    if not workers:
        for item in items:
            result: Any = work(item)
            yield result.pin_memory() if pin_memory else result
        return

    board = torch.zeros(workers, 3, dtype=torch.int64).share_memory_()
    board[:, _AT] = _IDLE
    loader = DataLoader(
        _Work(work),
        batch_size=None,  # an item is a whole batch already
        sampler=items,
        num_workers=workers,
        pin_memory=pin_memory,
        timeout=timeout_s,
        worker_init_fn=partial(_begin_worker, board=board),
        multiprocessing_context=_START_METHOD,
        generator=torch.Generator(),  # else it would draw from, and so change, torch's global one
    )
    results = iter(loader)
    try:
        while True:
            began_s = time.monotonic()
            try:
                result = next(results)
            except StopIteration:
                return
            except RuntimeError as error:
                if time.monotonic() - began_s < timeout_s:
                    raise
                raise TimeoutError(_who_hangs(board, describe, timeout_s)) from error
            yield result
    finally:
        _end(results, board)


def _who_hangs(board: Tensor, describe: Callable[[int], str], timeout_s: float) -> str:
    hanging = [
        f"worker {worker} (process {pid}) is at {describe(at)}"
        for worker, (pid, at, _) in enumerate(board.tolist())
        if at != _IDLE
    ]
    return (
        f"no batch for {timeout_s:g} s: {'; '.join(hanging) or 'no worker is at any image'}. "
        "Is the drive these images are on still answering?"
    )


def _end(results: Any, board: Tensor) -> None:
    """End the workers, those that hang with SIGKILL; DataLoader alone would wait 10 s for each of them."""
    board[:, _STOP] = 1
    deadline_s = time.monotonic() + _STOP_GRACE_S
    while (board[:, _AT] != _IDLE).any() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    hanging = set(board[board[:, _AT] != _IDLE, _PID].tolist())
    if hanging:
        with _unwatched_children():
            for process in multiprocessing.active_children():
                if process.pid in hanging:
                    process.kill()
                    process.join(_STOP_GRACE_S)
    results._shutdown_workers()  # else left to __del__, which an error's traceback can put off for ever


@contextmanager
def _unwatched_children() -> Iterator[None]:
    """DataLoader's SIGCHLD handler raises, wherever the main thread is, when a worker is killed."""
    try:
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    except ValueError:  # not the main thread, where no handler runs
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)

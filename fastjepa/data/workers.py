"""Work in other processes, its results in order.

A thin layer over torch's DataLoader, for what a long run on a cluster meets: signals sent to
every process of a job must not end the workers before the trainer has saved, a worker that hangs
must be named, and must not outlive the run, and one that is killed must be replaced.
"""

import atexit
import ctypes
import itertools
import logging
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastjepa.data.shards.store import StoreError

Item = TypeVar("Item")
Result = TypeVar("Result")

# The trainer decides when to stop, and then tells the workers.
_IGNORED_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")

# fork: a worker is there at once and has nothing to import. forkserver would put a process between
# the two that does die of SIGTERM. Outside Linux fork is not safe.
_START_METHOD = "fork" if sys.platform == "linux" else "spawn"

_STOP_GRACE_S = 2.0

# How often to look, while no result comes, whether the workers are alive.
_LOOK_S = 1.0
# A worker that is killed lets the pipe it answered through go a moment before it counts as dead.
_DEATH_SHOWS_S = 0.5

# Deaths end the run when so many come within so many results: then it is no accident.
MOST_DEATHS = 3
WITHIN_RESULTS = 1000

# The board is what the workers and the main process share: int64 [workers, 3].
_PID, _AT, _STOP = range(3)
_IDLE = -1
_my_row: Tensor | None = None  # of the board, in a worker process

_log = logging.getLogger(__name__)

_open: WeakSet[Generator[Any, None, None]] = WeakSet()


@atexit.register
def _close_what_is_open() -> None:
    # Python would wait at exit, for ever, for processes that ignore SIGTERM. What is registered
    # last runs first, and multiprocessing, which does the waiting, is imported above.
    for results in list(_open):
        results.close()


class WorkersDied(RuntimeError):
    """Workers were killed again and again; the message names them, what killed them and where they were."""


class NotWanted(Exception):
    """What was being read is not wanted any more: the run has been told to stop."""


class _Died(Exception):
    """A worker did; the message names it."""


class _Stopped(Exception):
    """Ends a worker's item early: its result is not wanted any more."""


def note(at: int) -> None:
    """Leave word of what this worker is at, a number >= 0: if it hangs there, the error says so."""
    if _my_row is not None:
        if _my_row[_STOP]:
            raise _Stopped
        _my_row[_AT] = at


class _Work(Dataset[Any], Generic[Item, Result]):
    def __init__(self, work: Callable[[Item], Result]) -> None:
        self.work = work

    def __getitem__(self, item: Any) -> "Result | StoreError":
        try:
            return self.work(item)
        except StoreError as error:  # raised in a worker it would come with all the lines of its traceback
            return error
        finally:
            if _my_row is not None:
                _my_row[_AT] = _IDLE


def _begin_worker(worker: int, board: Tensor) -> None:
    global _my_row
    for name in _IGNORED_SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    _die_with_parent()
    _my_row = board[worker]
    _my_row[_PID] = os.getpid()


def _die_with_parent() -> None:
    """It ignores signals, and so would outlive a trainer that is killed, with its connections and memory."""
    parent = multiprocessing.parent_process()
    if sys.platform == "linux" and parent is not None:
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent.pid:  # it was killed before that
            os._exit(1)


def in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    describe: Callable[[int], str],
    timeout_s: float,
    should_stop: Callable[[], bool] = lambda: False,
    pin_memory: bool = False,
) -> Generator[Result, None, None]:
    """`work(item)` for each item, in the order of the items.

    Args:
        work: what to do; with workers it must pickle where processes cannot be forked.
        items: taken in the main process, a little ahead of the results.
        workers: processes, each of one thread; 0 does the work here.
        describe: turns the last `note` of a worker that hangs into words.
        timeout_s: how long to wait for a result.
        should_stop: asked once a second while a worker's result is waited for.
        pin_memory: hand out `result.pin_memory()`, made in a thread beside the main one.

    A worker that dies is replaced, the others with it: the same results follow, done again where they were
    lost, so that `work` must give the same for the same item.

    Raises:
        NotWanted: `should_stop` said so.
        TimeoutError: no result in time; names the workers that hang, which are then killed.
        WorkersDied: workers died `MOST_DEATHS` times within `WITHIN_RESULTS` results.
    """
    results = _in_order(work, items, workers, describe, timeout_s, should_stop, pin_memory)
    _open.add(results)
    return results


def _in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    describe: Callable[[int], str],
    timeout_s: float,
    should_stop: Callable[[], bool],
    pin_memory: bool,
) -> Generator[Result, None, None]:
    if not workers:
        for item in items:
            result: Any = work(item)
            yield result.pin_memory() if pin_memory else result
        return

    deaths = _Deaths()
    to_do = iter(items)
    due: deque[Item] = deque()  # given to workers, their results not handed out yet
    while True:
        board = torch.zeros(workers, 3, dtype=torch.int64).share_memory_()
        board[:, _AT] = _IDLE
        loader = DataLoader(
            _Work(work),
            batch_size=None,  # an item is a whole batch already
            sampler=_noted(to_do, due),
            num_workers=workers,
            pin_memory=pin_memory,
            timeout=min(_LOOK_S, timeout_s),
            worker_init_fn=partial(_begin_worker, board=board),
            multiprocessing_context=_START_METHOD,
            generator=torch.Generator(),  # else it would draw from, and so change, torch's global one
        )
        with _children_handled_as_before():
            results: Any = iter(loader)
        try:
            while True:
                try:
                    result = _next(results, board, describe, timeout_s, should_stop)
                except StopIteration:
                    return
                due.popleft()
                deaths.handed_out += 1
                yield result
        except _Died as died:
            deaths.count(str(died))
            for process in results._workers:  # what they are at will be done again
                process.kill()
            board[:, _AT] = _IDLE
            to_do = itertools.chain(tuple(due), to_do)
            due.clear()
        finally:
            _end(results, board)


def _noted(items: Iterator[Item], due: deque[Item]) -> Iterator[Item]:
    for item in items:
        due.append(item)
        yield item


@dataclass
class _Deaths:
    """Counts, and gives up."""

    handed_out: int = 0  # results so far
    when: list[int] = field(default_factory=list)  # how many those had been at each death

    def count(self, who: str) -> None:
        """Of one more; raises WorkersDied if they are too many."""
        self.when.append(self.handed_out)
        recent = sum(self.handed_out - at < WITHIN_RESULTS for at in self.when)
        if recent >= MOST_DEATHS:
            raise WorkersDied(
                f"{who}: the last of {recent} such deaths. SIGKILL is mostly the kernel's when memory runs "
                "out: lower speed.workers. Another signal may be the doing of one image and what decodes it"
            )
        _log.warning("%s; new workers go on with the same images (death %d)", who, len(self.when))


def _next(
    results: Any,
    board: Tensor,
    describe: Callable[[int], str],
    timeout_s: float,
    should_stop: Callable[[], bool],
) -> Any:
    """The next result; StopIteration after the last.

    Raises:
        NotWanted, TimeoutError, _Died, StoreError: instead of it.
    """
    deadline_s = time.monotonic() + timeout_s
    while True:
        if who := _who_died(results, board, describe, within_s=0):
            raise _Died(who)
        try:
            result = next(results)
        except StopIteration:
            raise
        except Exception as error:
            # What a dead worker had sent cannot be fetched from it any more, which is known before its death.
            within_s = _DEATH_SHOWS_S if isinstance(error, OSError | EOFError) else 0.0
            if who := _who_died(results, board, describe, within_s):
                raise _Died(who) from error
            if not (isinstance(error, RuntimeError) and str(error).startswith("DataLoader timed out")):
                raise
            if should_stop():
                raise NotWanted from error
            if time.monotonic() >= deadline_s:
                raise TimeoutError(_who_hangs(board, describe, timeout_s)) from error
        else:
            if isinstance(result, StoreError):
                raise result
            return result


def _who_died(results: Any, board: Tensor, describe: Callable[[int], str], within_s: float) -> str:
    """In words; empty if all are alive."""
    dead = multiprocessing.connection.wait([process.sentinel for process in results._workers], within_s)
    words = []
    for i, process in enumerate(results._workers):
        if process.sentinel in dead:
            process.join(_DEATH_SHOWS_S)
            at = "" if board[i, _AT] == _IDLE else f" at {describe(int(board[i, _AT]))}"
            words.append(f"loader worker {i} (process {process.pid}) {_how(process.exitcode or 0)}{at}")
    return "; ".join(words)


def _how(exit_status: int) -> str:
    """In which way a process ended: 3 -> "ended with status 3", -9 -> "was killed by SIGKILL"."""
    if exit_status >= 0:
        return f"ended with status {exit_status}"
    try:
        return f"was killed by {signal.Signals(-exit_status).name}"
    except ValueError:  # a real-time signal has no name
        return f"was killed by signal {-exit_status}"


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
    for process in results._workers:
        if process.pid in hanging:
            process.kill()
            process.join(_STOP_GRACE_S)
    results._shutdown_workers()  # else left to __del__, which an error's traceback can put off for ever


@contextmanager
def _children_handled_as_before() -> Iterator[None]:
    """DataLoader's SIGCHLD handler raises, wherever the main thread is, when a worker is killed."""
    handler = signal.getsignal(signal.SIGCHLD)
    yield
    if threading.current_thread() is threading.main_thread():  # where DataLoader sets one
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)

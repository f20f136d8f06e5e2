import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastjepa.data import workers
from fastjepa.data.shards.store import StoreError
from fastjepa.data.workers import MOST_DEATHS, WITHIN_RESULTS, WorkersDied, in_order, note

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def nobody_handles_children() -> Iterator[None]:
    """Torch's own loader, in another test of this process, may have left a handler that raises."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGCHLD, before)


def start(
    work: Callable[[int], Any], items: Iterable[int], count: int = 2, timeout_s: float = 60.0
) -> Generator[Any, None, None]:
    return in_order(work, items, workers=count, describe="image {}".format, timeout_s=timeout_s)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def whoami(item: int) -> tuple[int, int, int]:
    note(item)
    return item, os.getpid(), torch.get_num_threads()


@pytest.mark.parametrize("count", [0, 1, 2])
def test_results_come_in_order_from_processes_of_one_thread(count: int) -> None:
    results = list(start(whoami, range(20), count))
    assert [item for item, _, _ in results] == list(range(20))
    if count:
        assert len({pid for _, pid, _ in results}) == count
        assert {threads for _, _, threads in results} == {1}
    else:
        assert {pid for _, pid, _ in results} == {os.getpid()}


def test_the_global_random_numbers_stay_as_they_are() -> None:
    state = torch.get_rng_state()
    list(start(whoami, range(4)))
    assert torch.equal(torch.get_rng_state(), state)


def test_signals_to_a_whole_job_do_not_end_workers() -> None:
    results = start(whoami, range(40))
    pids = {next(results)[1], next(results)[1]}
    for pid in pids:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(pid, number)
    assert [item for item, _, _ in results] == list(range(2, 40))


def test_closing_ends_the_workers() -> None:
    results = start(whoami, iter(int, 1))  # zeros without end
    pids = {next(results)[1] for _ in range(4)}
    results.close()
    assert not any(alive(pid) for pid in pids)


def hang_at_five(item: int) -> int:
    note(item)
    if item == 5:
        time.sleep(600)
    return os.getpid()


def test_a_worker_that_hangs_is_named_and_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_STOP_GRACE_S", 0.3)
    results = start(hang_at_five, range(40), timeout_s=2.0)
    pids: list[int] = []
    with pytest.raises(TimeoutError, match=r"for 2 s: worker 1 \(process \d+\) is at image 5\.") as hang:
        pids.extend(results)
    assert str(pids[1]) in str(hang.value)
    assert not any(alive(pid) for pid in set(pids))


def killed_once(item: int, marks: Path) -> tuple[int, int]:
    """At 5 and at 11 a worker kills itself, the first time that one comes there."""
    note(item)
    mark = marks / str(item)
    if item in (5, 11) and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return item, os.getpid()


@pytest.mark.parametrize("count", [1, 2])
def test_a_worker_that_is_killed_is_replaced_and_no_result_is_lost(
    count: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    results = list(start(partial(killed_once, marks=tmp_path), iter(range(40)), count))
    assert [item for item, _ in results] == list(range(40))
    assert signal.getsignal(signal.SIGCHLD) is handler
    assert not any(alive(pid) for _, pid in results)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    first, second = caplog.messages
    assert re.match(r"loader worker \d \(process \d+\) was killed by SIGKILL at image 5; new workers", first)
    assert "at image 11; " in second
    assert second.endswith("(death 2)")


def test_a_worker_killed_from_outside_while_nobody_waits_for_it() -> None:
    """No handler may raise in what the main thread does then."""
    results = start(whoami, range(200))
    pids = {next(results)[1], next(results)[1]}
    os.kill(pids.pop(), signal.SIGKILL)
    deadline_s = time.monotonic() + 0.3
    while time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert [item for item, _, _ in results] == list(range(2, 200))


def killed_at_five(item: int) -> int:
    note(item)
    if item == 5:
        os.kill(os.getpid(), signal.SIGSEGV)
    return item


def test_workers_that_are_killed_again_and_again_are_given_up() -> None:
    results = start(killed_at_five, range(40))
    done: list[int] = []
    message = r"worker \d \(process \d+\) was killed by SIGSEGV at image 5: the last of 3 such deaths"
    with pytest.raises(WorkersDied, match=message):
        done.extend(results)
    assert done == list(range(5))[: len(done)]


def end_at_three(item: int) -> int:
    if item == 3:
        os._exit(7)
    return item


def test_a_worker_that_ends_is_named_with_its_status() -> None:
    with pytest.raises(WorkersDied, match="ended with status 7"):
        list(start(end_at_three, range(10), 1))


@given(st.lists(st.integers(0, 3 * WITHIN_RESULTS), max_size=12).map(sorted))
def test_deaths_far_apart_are_forgiven(when: list[int]) -> None:
    deaths = workers._Deaths()
    gave_up = False
    for at in when:
        deaths.handed_out = at
        try:
            deaths.count("someone")
        except WorkersDied:
            gave_up = True
            break
    apart = zip(when, when[MOST_DEATHS - 1 :], strict=False)
    assert gave_up == any(last - first < WITHIN_RESULTS for first, last in apart)


def fail_at_five(item: int) -> int:
    if item == 5:
        raise LookupError("the fifth")
    return os.getpid()


def test_an_error_in_a_worker_comes_through_and_ends_the_others() -> None:
    results = start(fail_at_five, range(40))
    pids: list[int] = []
    with pytest.raises(LookupError, match="the fifth"):
        pids.extend(results)
    assert not any(alive(pid) for pid in set(pids))


def test_python_exits_though_results_are_left_open_and_a_worker_hangs(tmp_path: Path) -> None:
    script = tmp_path / "left_open.py"
    script.write_text(
        "import time\n"
        "from fastjepa.data import workers\n"
        "workers._STOP_GRACE_S = 0.3\n"
        "def work(item):\n"
        "    workers.note(item)\n"
        "    time.sleep(600 * (item == 3))\n"
        "    return item\n"
        "results = workers.in_order(work, range(9), workers=2, describe=str, timeout_s=600)\n"
        "print(next(results), next(results), next(results))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(
        [sys.executable, script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "1", "2"]
    assert done.stderr == ""


def unanswered(item: int) -> int:
    if item == 2:
        raise StoreError("cannot read s3://bucket/a.tar, tried 4 times: it is gone")
    return item


@pytest.mark.parametrize("workers", [0, 2])
def test_a_store_that_does_not_answer_is_told_in_one_line(workers: int) -> None:
    results = in_order(unanswered, range(9), workers=workers, describe=str, timeout_s=60)
    with closing(results), pytest.raises(StoreError) as told:
        list(results)
    assert str(told.value) == "cannot read s3://bucket/a.tar, tried 4 times: it is gone"

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastjepa.data import workers
from fastjepa.data.workers import in_order, note

ROOT = Path(__file__).resolve().parents[2]


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

"""What tests of faults share: runs with a witness, rows of the table, and chance that can be repeated."""

import fcntl
import os
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.faults.evidence import Watched, Witness
from tests.faults.processes import commands, end_all
from tests.faults.table import PROPERTY, Row, Table

if TYPE_CHECKING:
    from tests.conftest import Trainer


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Iterator[Callable[[str, str], Row]]:
    """Open a row: table("what happens", "what comes of it")."""
    rows: list[Row] = []

    def open_row(fault: str, outcome: str) -> Row:
        rows.append(Row(fault, outcome))
        return rows[-1]

    yield open_row
    # These travel with the report of the test, from other processes too.
    request.node.user_properties.extend((PROPERTY, asdict(row)) for row in rows)


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """Chance that a failing test can be repeated with: its seed is printed, and taken from FAULTS_SEED."""
    seed = os.environ.get("FAULTS_SEED") or str(random.SystemRandom().randrange(2**32))
    print(f"FAULTS_SEED={seed}")
    return random.Random(f"{seed} {request.node.name}")


@pytest.fixture(autouse=True)
def nothing_outlives_a_test(tmp_path: Path) -> Iterator[None]:
    """All processes of a run have its folder among their arguments, and so have those that they fork."""
    yield
    left = {pid: command for pid, command in commands().items() if str(tmp_path) in command}
    end_all(left)
    assert left == {}, "processes outlive the test"


@pytest.fixture
def watched(train: "Trainer") -> Watched:
    """The run of a test."""
    return Watched(train, Witness(train.home / "witness"))


@pytest.fixture(scope="session")
def uninterrupted(
    trainer_at: "Callable[[Path], Trainer]", tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Watched]:
    """Runs that nothing happened to, by their settings: each is made once, for all processes that test."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def make(*overrides: str, launcher: tuple[str, ...] = ()) -> Watched:
        settings = zlib.crc32("\n".join((*overrides, *launcher)).encode())
        home = shared / f"uninterrupted_{settings:08x}"
        home.mkdir(exist_ok=True)
        run = Watched(trainer_at(home), Witness(home / "witness"))
        with (home / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # given up when the process ends, however it ends
            if (home / "done").exists():
                run.witness.starts = 1
            else:
                run(*overrides, launcher=launcher).check()
                (home / "done").touch()
        return run

    return make


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.fault)


def pytest_configure(config: pytest.Config) -> None:
    # The process that prints: those that only test send it their reports.
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Table(), "table-of-faults")

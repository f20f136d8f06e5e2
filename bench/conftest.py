"""The benchmarks' options, what they share, and the comparison that is printed after them."""

from pathlib import Path

import pytest
import torch

from bench.kernels import choices, results
from bench.kernels.case import Compare
from bench.kernels.clock import WallClock
from bench.kernels.session import Session
from bench.kernels.session import compare as compare_ways
from bench.kernels.table import markdown, summary

SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastjepa")
    group.addoption(
        "--write-table",
        action="store_true",
        help="write which implementation was fastest to fastjepa_kernels/tables/, for the ops measured",
    )
    group.addoption("--results", type=Path, default=results.RESULTS, help="folder of the results")
    group.addoption("--tables", type=Path, default=choices.TABLES, help="folder of the tables")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SESSION] = Session(WallClock(), seconds_each=1.5, copied_bytes=32 << 20)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"case", "phase"} <= set(metafunc.fixturenames):
        pairs = [(c, phase) for c in metafunc.module.cases("cpu", torch.float32) for phase in c.bytes_moved]
        metafunc.parametrize(("case", "phase"), pairs, ids=[f"{phase}-{c.name}" for c, phase in pairs])


@pytest.fixture
def session(request: pytest.FixtureRequest) -> Session:
    """What the benchmarks of this run share."""
    return request.config.stash[SESSION]


@pytest.fixture
def compare(session: Session, benchmark: object) -> Compare:
    """Judge the ways of a case, then race them."""
    return lambda case, phase: compare_ways(session, benchmark, case, phase)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = config.stash[SESSION]
    if not session.rows or config.getoption("benchmark_disable", False):
        return
    terminalreporter.section("the ways of each op, in one process, in turn; medians")
    terminalreporter.write_line(markdown(session.rows))
    terminalreporter.write_line(summary(session.rows) + "\n")
    for line in session.left_out:
        terminalreporter.write_line(f"not measured: {line}")
    tables = config.getoption("tables") if config.getoption("write_table") else None
    for line in session.write(config.getoption("results"), tables):
        terminalreporter.write_line(line)

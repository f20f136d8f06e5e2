"""The table of faults that runs survived: tests fill in rows, and the end of all tests prints them."""

import json
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path

import pytest

from tests.faults.evidence import Watched, differing_bytes, images_lost, tensors

BUILD = Path(__file__).resolve().parents[2] / "build"
HEADINGS = ("fault", "outcome", "times", "images lost", "bytes of weights that differ")
PROPERTY = "fault"  # of a test's report, which travels between processes


@dataclass
class Row:
    """A row of the table, filled in by a test as it goes.

    Attributes:
        fault: what happens to a run. Rows of one fault are added up.
        outcome: what the run makes of it.
        times: how often it was done.
        images_lost: left out, or trained on once too often; None where the fault ends a run for good.
        bytes_differing: of the last checkpoint, target encoder and moments included; likewise.
    """

    fault: str
    outcome: str
    times: int = 0
    images_lost: int | None = None
    bytes_differing: int | None = None

    def hold_against(self, run: Watched, reference: Watched) -> None:
        """Count what a run that met the fault has lost, and see that it is nothing."""
        lost = images_lost(run.witness, reference.witness)
        ours, expected = (tensors(watched.trainer.run, run.step) for watched in (run, reference))
        differing = differing_bytes(ours, expected)
        self.images_lost = (self.images_lost or 0) + lost
        self.bytes_differing = (self.bytes_differing or 0) + differing
        assert (lost, differing) == (0, 0), "images lost, bytes that differ"


class Table:
    """A pytest plugin: collects the rows of all tests, in whatever processes they ran."""

    def __init__(self, folder: Path = BUILD) -> None:
        self.folder = folder
        self.rows: list[tuple[str, Row]] = []  # with the test's id
        self.unfinished: dict[str, str] = {}  # test's id -> outcome

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.unfinished[report.nodeid] = f"FAILED: {name_of(report.nodeid)}"
        elif report.skipped and isinstance(report.longrepr, tuple):
            self.unfinished[report.nodeid] = report.longrepr[2]
        if report.when == "teardown":
            rows = [Row(**cells) for key, cells in report.user_properties if key == PROPERTY]  # type: ignore[arg-type]
            if not rows and report.nodeid in self.unfinished:
                rows = [Row(name_of(report.nodeid), "")]
            self.rows += [(report.nodeid, row) for row in rows]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        rows = self.merged()
        if rows:
            text = as_markdown(rows)
            terminalreporter.section("faults")
            terminalreporter.write_line(text)
            self.folder.mkdir(exist_ok=True)
            (self.folder / "faults.md").write_text(text + "\n", encoding="utf-8")
            as_json = json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False)
            (self.folder / "faults.json").write_text(as_json + "\n", encoding="utf-8")

    def merged(self) -> list[Row]:
        """A row for each fault, file by file."""
        merged: dict[str, Row] = {}
        for test, row in sorted(self.rows, key=lambda entry: entry[0].partition("::")[0]):
            row = replace(row, outcome=self.unfinished.get(test, row.outcome))
            before = merged.get(row.fault, replace(row, times=0, images_lost=None, bytes_differing=None))
            outcomes = (before.outcome, row.outcome)
            merged[row.fault] = Row(
                row.fault,
                "; ".join(dict.fromkeys(outcomes)),
                before.times + row.times,
                total((before.images_lost, row.images_lost)),
                total((before.bytes_differing, row.bytes_differing)),
            )
        return list(merged.values())


def name_of(nodeid: str) -> str:
    return nodeid.rpartition("::")[2]


def total(counts: Iterable[int | None]) -> int | None:
    """None if nothing was counted."""
    found = [count for count in counts if count is not None]
    return sum(found) if found else None


def as_markdown(rows: list[Row]) -> str:
    cells = [HEADINGS, *(tuple("–" if cell is None else str(cell) for cell in astuple(row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)

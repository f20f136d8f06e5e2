"""The table says what tests measured, and does not pass over what failed."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.faults.evidence import Seen, Witness, images_lost
from tests.faults.table import Row, Table


def report(
    test: str, outcome: Any, *rows: Row, when: Any = "teardown", reason: Any = None
) -> pytest.TestReport:
    return pytest.TestReport(
        nodeid=test, location=("", None, ""), keywords={}, outcome=outcome, longrepr=reason, when=when,
        user_properties=[("fault", asdict(row)) for row in rows],
    )  # fmt: skip


class Lines:
    """A terminal."""

    text = ""

    def section(self, title: str) -> None:
        self.text += f"{title}\n"

    def write_line(self, line: str) -> None:
        self.text += f"{line}\n"


def test_rows_of_a_fault_are_added_up_and_failures_shown(tmp_path: Path) -> None:
    table = Table(tmp_path)
    table.pytest_runtest_logreport(report("b.py::first", "passed", Row("killed", "resumes", 5, 0, 0)))
    table.pytest_runtest_logreport(report("b.py::second", "passed", Row("killed", "resumes", 2, 3, None)))
    table.pytest_runtest_logreport(report("c.py::third", "failed", when="call"))
    table.pytest_runtest_logreport(report("c.py::third", "passed", Row("hung", "is named", 1)))
    table.pytest_runtest_logreport(report("a.py::fourth", "failed", when="setup"))
    table.pytest_runtest_logreport(report("a.py::fourth", "passed"))
    table.pytest_runtest_logreport(
        report("d.py::fifth", "skipped", when="call", reason=("d.py", 3, "no mounts"))
    )
    table.pytest_runtest_logreport(report("d.py::fifth", "passed"))
    terminal: Any = Lines()
    table.pytest_terminal_summary(terminal)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in terminal.text.splitlines()[3:]]
    assert rows == [
        ["fourth", "FAILED: fourth", "0", "–", "–"],
        ["killed", "resumes", "7", "3", "0"],
        ["hung", "FAILED: third", "1", "–", "–"],
        ["fifth", "no mounts", "0", "–", "–"],
    ]
    assert (tmp_path / "faults.md").read_text() == terminal.text.partition("\n")[2]
    assert (tmp_path / "faults.json").exists()


def test_a_lost_and_a_repeated_image_are_counted(tmp_path: Path) -> None:
    def note(run: str, start: int, steps: dict[int, list[int]]) -> Witness:
        witness = Witness(tmp_path / run)
        witness.starts = start
        folder = witness.folder / f"start_{start:03d}"
        folder.mkdir(parents=True)
        lines = [
            f'{{"step": {step}, "seen": [{[list(Seen(0, image, 0, 0)) for image in images]}]}}\n'
            for step, images in steps.items()
        ]
        (folder / "1.jsonl").write_text("".join(lines) + '{"step": 9, "se')
        return witness

    whole = note("whole", 1, {0: [1, 2], 1: [3, 4], 2: [5, 6]})
    note("resumed", 1, {0: [1, 2], 1: [3, 4]})
    assert images_lost(note("resumed", 2, {1: [3, 4], 2: [5, 6]}), whole) == 0
    note("skipped", 1, {0: [1, 2], 1: [3, 4]})
    assert images_lost(note("skipped", 2, {2: [5, 6]}), whole) == 0
    note("other", 1, {0: [1, 2]})
    assert images_lost(note("other", 2, {1: [3, 3], 2: [5]}), whole) == 3

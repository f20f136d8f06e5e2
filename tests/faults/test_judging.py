"""Judging that fails while a run trains."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.evidence import Watched, lines_with
from tests.faults.table import Row
from tests.faults.test_bad_images import RUN as FOLDER_RUN
from tests.faults.test_bad_images import STEPS
from tests.faults.test_signalled import write_two_classes


@pytest.mark.slow_fault
def test_the_images_to_judge_on_are_gone(
    watched: Watched, table: Callable[[str, str], Row], tmp_path: Path
) -> None:
    row = table("the images to judge on are gone", "trains on and saves; at the end fails, to be judged yet")
    write_two_classes(tmp_path / "images")
    write_two_classes(tmp_path / "probe")
    overrides = (
        *FOLDER_RUN, f"data.root={tmp_path / 'images'}", f"data.probe_root={tmp_path / 'probe'}",
        "data.hold_out=0", "probe.at_ends=true", "probe.every_steps=10",
    )  # fmt: skip
    process = watched.start(*overrides, gates=[5])
    with watched.standing_at(process, 5):
        (tmp_path / "probe").rename(tmp_path / "elsewhere")
    row.times += 1
    failed = watched.finish(process).check(1)
    assert lines_with(failed.out, "warning: step 10 is not judged, and training goes on: TooManyUnreadable: ")
    assert len(failed.errors) == 1
    assert watched.step == STEPS

    (tmp_path / "elsewhere").rename(tmp_path / "probe")
    done = watched(*overrides).check()
    assert lines_with(done.out, "trained target encoder")
    assert sorted(watched.witness.trained_on()) == list(range(STEPS))

"""One seed, one result: whether a run saves or not, and each time it is started."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.faults.evidence import RUN, Watched, Witness, results
from tests.faults.table import Row

if TYPE_CHECKING:
    from tests.conftest import Trainer


@pytest.mark.parametrize(
    ("fault", "settings"),
    [
        ("two runs, one seed", [(), ("speed.workers=2",)]),
        ("saving at every step, or never", [("run.save_every=1",), ("run.save_every=1000000",)]),
    ],
    ids=["again", "saving"],
)
def test_same_bits(
    trainer_at: "Callable[[Path], Trainer]",
    tmp_path: Path,
    uninterrupted: Callable[..., Watched],
    table: Callable[[str, str], Row],
    fault: str,
    settings: list[tuple[str, ...]],
) -> None:
    row = table(fault, "the same bits")
    reference = uninterrupted(*RUN)
    runs = []
    for number, overrides in enumerate(settings):
        home = tmp_path / str(number)
        home.mkdir()
        run = Watched(trainer_at(home), Witness(home / "witness"))
        runs.append((run, run.start(*RUN, *overrides)))
    for run, process in runs:
        run.finish(process).check()
        row.times += 1
        row.hold_against(run, reference)
        assert results(run.trainer) == results(reference.trainer)

"""A run that moves: other ranks, ZeRO stages and workers take it up in the middle of an epoch."""

import signal
from collections.abc import Callable, Sequence

import pytest

from tests.faults.evidence import (
    STEPS,
    TWO,
    Watched,
    assert_same_steps,
    differing_bytes,
    images_lost,
    lines_with,
    results,
    tensors,
)
from tests.faults.table import Row

RUN = (f"optim.steps={STEPS}", "run.log_every=1", "run.save_every=1000", "data.flip=0.5")
STOPS = (21, 44, 69, 93)  # in epochs of 17 steps


def go_through(watched: Watched, run: Sequence[str], parts: Sequence[tuple[int, Sequence[str]]]) -> None:
    """Run it in parts of (ranks, settings), stopped by SIGTERM near STOPS."""
    for number, (ranks, settings) in enumerate(parts):
        launcher = TWO if ranks > 1 else ()
        if number == len(parts) - 1:
            ended = watched(*run, *settings, launcher=launcher).check()
        else:
            process = watched.start(*run, *settings, launcher=launcher, gates=[STOPS[number]])
            with watched.standing_at(process, STOPS[number]):
                process.send_signal(signal.SIGTERM)
            ended = watched.finish(process).check()
            assert STOPS[number] <= watched.step < STEPS, ended
        if number:
            assert lines_with(ended.out, "Resuming at step"), ended


def hold_against(watched: Watched, reference: Watched, row: Row) -> None:
    """All but the bits: sums over ranks are taken in another order."""
    lost = images_lost(watched.witness, reference.witness)
    row.images_lost = (row.images_lost or 0) + lost
    assert lost == 0
    assert_same_steps(watched.witness, reference.witness)
    losses, expected = (
        {line["step"]: line["loss"] for line in results(run.trainer) if "loss" in line}
        for run in (watched, reference)
    )
    assert losses == pytest.approx(expected, rel=1e-3)


MODES = {
    "budget": (),
    "packed": ("masks.mode=packed", "masks.context_tokens=null"),
    # As published, contexts are cut to the shortest of a micro-batch, whose size must stay.
    "truncate": ("masks.mode=truncate", "masks.context_tokens=null", "speed.accumulation=2"),
}


@pytest.mark.slow_fault
@pytest.mark.parametrize("mode", MODES)
def test_ranks_stages_and_workers(
    watched: Watched, uninterrupted: Callable[..., Watched], table: Callable[[str, str], Row], mode: str
) -> None:
    row = table(
        "resumed by 1, 2, 1 ranks at ZeRO 0, 1, 2, with 0 to 3 workers",
        "same images, crops and masks; losses within 1e-3",
    )
    run = (*RUN, *MODES[mode])
    two = ("speed.accumulation=1",) if mode == "truncate" else ()
    parts: list[tuple[int, Sequence[str]]] = [
        (1, ("speed.workers=2",)),
        (2, ("speed.workers=1", *two)),
        (1, ("speed.workers=3", "speed.zero_stage=2")),
    ]
    reference = uninterrupted(*run)
    go_through(watched, run, parts)
    row.times += len(parts) - 1
    hold_against(watched, reference, row)


@pytest.mark.slow_fault
def test_stages(
    watched: Watched, uninterrupted: Callable[..., Watched], table: Callable[[str, str], Row]
) -> None:
    row = table("resumed at ZeRO 0, 1, 2, 3, 0 by one process", "same bits")
    parts = [(1, (f"speed.zero_stage={stage}",)) for stage in (0, 1, 2, 3, 0)]
    reference = uninterrupted(*RUN)
    go_through(watched, RUN, parts)
    row.times += len(parts) - 1
    hold_against(watched, reference, row)
    row.hold_against(watched, reference)


@pytest.mark.slow_fault
def test_two_ranks_and_two_again(
    watched: Watched, uninterrupted: Callable[..., Watched], table: Callable[[str, str], Row]
) -> None:
    row = table("two ranks resumed by two, at ZeRO 1, 2, 1", "same bits")
    parts = [(2, (f"speed.zero_stage={stage}", f"speed.workers={stage}")) for stage in (1, 2, 1)]
    reference = uninterrupted(*RUN, launcher=TWO)
    go_through(watched, RUN, parts)
    row.times += len(parts) - 1
    row.hold_against(watched, reference)
    ours, expected = (tensors(run.trainer.run, STEPS) for run in (watched, reference))
    assert differing_bytes(ours, expected) == 0


@pytest.mark.slow_fault
def test_two_ranks_with_cut_weights(
    watched: Watched, uninterrupted: Callable[..., Watched], table: Callable[[str, str], Row]
) -> None:
    """The weights that the network computes with are put back too, and not only the masters."""
    row = table("two ranks resumed by two, at ZeRO 3", "same bits")
    run = (*RUN, "speed.zero_stage=3")
    reference = uninterrupted(*run, launcher=TWO)
    go_through(watched, run, [(2, ()), (2, ("speed.workers=2",))])
    row.times += 1
    row.hold_against(watched, reference)
    ours, expected = (tensors(run.trainer.run, STEPS) for run in (watched, reference))
    assert differing_bytes(ours, expected) == 0

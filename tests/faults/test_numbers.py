"""Numbers that are none, and features that collapse."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.evidence import RUN, STEPS, TWO, Watched, assert_same_steps, images_lost, lines_with
from tests.faults.table import Row

HARM = str(Path(__file__).with_name("harm.py"))


@pytest.mark.slow_fault
def test_gradients_on_one_rank_that_are_no_numbers(
    watched: Watched, uninterrupted: Callable[..., Watched], table: Callable[[str, str], Row]
) -> None:
    row = table("a gradient that is no number, on one rank of two", "both skip the step, with a warning")
    done = watched(*RUN, launcher=(*TWO, HARM, "nan_gradient", "1:30,32")).check()
    row.times += 2
    for step in (31, 33):  # counted from 1
        assert len(lines_with(done.out, f"warning: step {step}: the gradients are not finite")) == 1, done.out
    assert watched.step == STEPS
    reference = uninterrupted(*RUN, launcher=TWO)
    row.images_lost = images_lost(watched.witness, reference.witness)
    assert row.images_lost == 0
    assert_same_steps(watched.witness, reference.witness)


@pytest.mark.slow_fault
def test_a_bad_step_that_was_to_be_kept(watched: Watched, table: Callable[[str, str], Row]) -> None:
    row = table(
        "a gradient that is no number, at a step to be saved and judged", "the next step is, and kept as it"
    )
    often = ("run.save_every=5", "run.keep_every=5", "run.keep_last=1", "probe.every_steps=5")
    watched("optim.steps=13", *often, launcher=("python", HARM, "nan_gradient", "0:4")).check()
    row.times += 1
    assert watched.trainer.saved_steps == [6, 10, 13]
    assert [r["step"] for r in watched.trainer.rows if "knn_top1" in r] == [6, 10]


@pytest.mark.slow_fault
def test_gradients_that_stay_so(watched: Watched, table: Callable[[str, str], Row]) -> None:
    row = table(
        "gradients that are no numbers, three steps in a row", "all ranks stop; the good checkpoint is named"
    )
    failed = watched(*RUN, launcher=(*TWO, HARM, "nan_gradient", "1:37,38,39"))
    row.times += 1
    assert failed.code != 0
    assert lines_with(
        failed.err,
        "error: the gradients were not finite in 3 steps in a row, from step 38 on",
        "The last good checkpoint is",
        "step_00000035",
    )
    assert watched.step == 35


@pytest.mark.slow_fault
def test_weights_that_blow_up(watched: Watched, table: Callable[[str, str], Row]) -> None:
    row = table(
        "a learning rate that is far too high", "stops; step, images and the good checkpoint are named"
    )
    failed = watched(*RUN, "optim.lr=1e30", "optim.warmup_epochs=0", "run.save_every=1").check(1)
    row.times += 1
    assert len(failed.errors) == 1
    assert lines_with(failed.errors[0], "not finite", "step 2", "the images ", "The last good checkpoint is")
    assert watched.trainer.saved_steps == [1]


def test_collapse(
    watched: Watched, uninterrupted: Callable[..., Watched], table: Callable[[str, str], Row]
) -> None:
    """The loss is better than that of a healthy run: only the effective rank tells."""
    row = table("collapse: a target that follows too fast", "warned of by effective rank; the loss is fine")
    done = watched(*RUN, "optim.lr=3e-2", "optim.momentum=0.9", "optim.final_momentum=0.9").check()
    row.times += 1
    assert lines_with(done.out, "warning: step ", "the target uses few dimensions (token_rankme ")
    first, last = watched.trainer.rows[0], watched.trainer.rows[-1]
    assert last["token_rankme"] < first["token_rankme"] / 2
    healthy = uninterrupted(*RUN).trainer
    assert healthy.rows[-1]["token_rankme"] > first["token_rankme"] / 2
    assert last["loss"] < healthy.rows[-1]["loss"] < first["loss"]
    assert not lines_with(done.out, "warning:", "loss rose")

"""What befell a run, told from its rows."""

from fastjepa.report.events import events

SOUND = {"step": 50, "elapsed_s": 1.0, "loss": 0.4, "skipped_steps": 0}


def test_a_sound_run_has_none() -> None:
    assert events([]) == []
    assert events([SOUND, {"step": 60, "knn_top1": 0.5}]) == []


def test_a_run_without_a_finite_loss_has_diverged() -> None:
    (skipped, diverged) = events([SOUND, {"step": 51, "elapsed_s": 1.1, "skipped_steps": 1}])
    assert skipped.startswith("In 1 of 51 steps the gradients were not finite")
    assert diverged.startswith("The run has diverged: ")
    assert "at step 51" in diverged
    assert "step 50" in diverged


def test_a_judgement_has_no_loss_and_is_no_divergence() -> None:
    assert events([SOUND, {"step": 100, "knn_top1": 0.5}]) == []


def test_a_run_that_recovers_has_not_diverged() -> None:
    rows = [SOUND, {"step": 51, "elapsed_s": 1.1}, SOUND | {"step": 52}]
    assert events(rows) == []


def test_a_spike_is_told_with_what_the_run_did() -> None:
    spike = {"spike_step": 120, "spike_loss": 3.1, "usual_loss": 0.4}
    (on,) = events([{"step": 123, **spike}])
    assert on == "The loss rose from 0.4 to 3.1 at step 120, and the run went on."
    (back,) = events([{"step": 100, **spike}])
    assert back.startswith("The loss rose from 0.4 to 3.1 at step 120: the run went back to step 100 and on")
    (huge,) = events([{"step": 123, "spike_step": 120}])
    assert huge == "The loss rose beyond all numbers at step 120, and the run went on."

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjepa.report.load import Probe, Summary
from fastjepa.report.verdict import so_far, verdict

accuracies = st.floats(0, 1)


def summary(trained: Probe, pixels: Probe | None = None, untrained: Probe | None = None) -> Summary:
    return Summary(name="run", probes=tuple(p for p in (pixels, untrained, trained) if p is not None))


def test_a_clean_win() -> None:
    first, linear, knn = verdict(
        summary(
            Probe("trained target encoder", knn_top1=0.83, linear_top1=0.87),
            Probe("raw pixels", knn_top1=0.80, linear_top1=0.836),
            Probe("untrained encoder", knn_top1=0.67, linear_top1=0.743),
        )
    )
    assert first == (
        "The trained target encoder beats raw pixels by linear probe and kNN, "
        "and beats an untrained encoder by linear probe and kNN."
    )
    assert "3.4 points above raw pixels" in linear
    assert "16.0 points above an untrained encoder" in knn


def test_a_loss_is_called_a_loss() -> None:
    first, linear = verdict(
        summary(Probe("trained target encoder", linear_top1=0.70), Probe("raw pixels", linear_top1=0.836))
    )
    assert first == "The trained target encoder does not beat raw pixels by linear probe."
    assert "13.6 points below raw pixels" in linear
    assert "an untrained encoder not measured" in linear


def test_a_win_by_one_measure_is_not_called_a_win_by_both() -> None:
    first, *_ = verdict(
        summary(Probe("trained context encoder", 0.79, 0.86), Probe("raw pixels", 0.80, 0.83))
    )
    assert first == "The trained context encoder beats raw pixels by linear probe but not by kNN."


def test_without_a_probe_nothing_is_claimed() -> None:
    assert verdict(Summary(name="run")) == ["The trained encoder has not been probed."]
    (only,) = verdict(summary(Probe("trained target encoder", linear_top1=0.9)))
    assert "no baseline" in only


@settings(deadline=None)
@given(trained=accuracies, pixels=accuracies)
def test_beats_is_said_exactly_when_the_gap_is_more_than_luck(trained: float, pixels: float) -> None:
    first, numbers = verdict(
        summary(Probe("trained target encoder", linear_top1=trained), Probe("raw pixels", linear_top1=pixels))
    )
    deviation = ((trained * (1 - trained) + pixels * (1 - pixels)) / 10_000) ** 0.5
    gap = trained - pixels
    if "beats raw pixels" in first:
        assert gap > 1.9 * deviation
    if "level with" in numbers:
        assert abs(gap) < 2.1 * deviation + 2e-4
    assert ("beats raw pixels" in first) == ("points above raw pixels" in numbers)


@pytest.mark.parametrize(("images", "wins"), [(200, False), (1000, False), (10_000, True), (50_000, True)])
def test_how_much_is_luck_depends_on_how_many_images_were_judged(images: int, wins: bool) -> None:
    first, *_ = verdict(
        Summary(
            "run",
            judged_images=images,
            probes=(Probe("raw pixels", linear_top1=0.80), Probe("trained encoder", linear_top1=0.82)),
        )
    )
    assert ("beats raw pixels" in first) == wins


def test_a_run_that_was_given_weights_is_held_against_them() -> None:
    probes = (
        Probe("raw pixels", linear_top1=0.70),
        Probe("untrained encoder", linear_top1=0.60),
        Probe("initial weights", linear_top1=0.90),
        Probe("trained encoder", linear_top1=0.85),
    )
    first, numbers = verdict(Summary("run", probes=probes))
    assert first.endswith("and does not beat the weights it began with by linear probe.")
    assert "5.0 points below the weights it began with" in numbers
    assert "began" not in " ".join(verdict(Summary("run", probes=(probes[0], probes[1], probes[3]))))


def test_the_end_of_a_run_taken_up_again_is_not_told_twice() -> None:
    ended = Summary("run", probes=(Probe("trained encoder", knn_top1=0.7),))
    rows = [{"step": 10, "knn_top1": 0.5}, {"step": 20, "knn_top1": 0.7}]
    assert so_far(rows, ended) is None
    newer = so_far([*rows, {"step": 30, "knn_top1": 0.6}], ended)
    assert newer is not None
    assert newer.startswith("So far, at step 30")


def test_so_far_is_the_newest_judgement() -> None:
    assert so_far([{"step": 10, "loss": 1.0}], Summary("run")) is None
    rows = [{"step": 10, "knn_top1": 0.5}, {"step": 20, "knn_top1": 0.6}, {"step": 30, "loss": 1.0}]
    quick = Summary("run", along=(Probe("raw pixels", 0.55, 0.7), Probe("trained", 0.1, 0.1)))
    beside = so_far(rows, quick)
    assert beside is not None
    assert beside.endswith("kNN 60.0\N{NO-BREAK SPACE}% (raw pixels 55.0\N{NO-BREAK SPACE}%).")
    assert (
        so_far(rows, Summary("run"))
        == "So far, at step 20 and judged on fewer images: kNN 60.0\N{NO-BREAK SPACE}%."
    )

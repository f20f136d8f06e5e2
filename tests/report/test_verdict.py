from hypothesis import given, settings
from hypothesis import strategies as st

from fastjepa.report.load import Probe, Summary
from fastjepa.report.verdict import TIE_POINTS, so_far, verdict

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
    points = 100 * (trained - pixels)
    assert ("beats raw pixels" in first) == (points >= TIE_POINTS)
    assert ("level with" in numbers) == (abs(points) < TIE_POINTS)


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

import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from fastjepa.report import figures
from fastjepa.report.load import Metrics, Probe, Summary

METRICS: Metrics = [
    {
        "step": s,
        "images": 128 * s,
        "loss": 0.4 / (1 + s),
        "token_rankme": 20.0 + s,
        "target_std": 0.6,
        "lr": 1e-3 * s,
    }
    | ({"linear_top1": 0.7 + 0.001 * s} if s % 20 == 0 else {})
    for s in range(0, 101, 10)
]
SUMMARY = Summary(
    "run",
    probes=(
        Probe("raw pixels", 0.80, 0.836),
        Probe("untrained encoder", 0.60, 0.74),
        Probe("trained target encoder", 0.82, 0.86),
    ),
)


def texts(figure: Figure | None) -> list[str]:
    assert figure is not None
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_nothing_logged_is_nothing_drawn() -> None:
    for metrics in ([], [{"step": 10.0}], [{"step": 10.0, "loss": float("nan")}]):
        assert figures.loss_curve(metrics) is None
        assert figures.probe_curve(metrics, SUMMARY, "knn_top1") is None
        assert figures.rank_curve(metrics) is None
        assert figures.std_curve(metrics) is None
        assert figures.speed_curve(metrics) is None
        assert figures.schedule_curves(metrics) is None
    assert figures.probe_bars(Summary("run")) is None


def test_a_probe_is_drawn_where_it_was_measured_with_its_baselines() -> None:
    figure = figures.probe_curve(METRICS, SUMMARY, "linear_top1")
    assert texts(figure) == ["untrained 74.0", "now 80.0", "raw pixels 83.6"]
    assert figure is not None
    x, y = np.array(figure.axes[0].lines[0].get_xydata()).T
    assert x.tolist() == [128 * s for s in range(0, 101, 20)]
    assert y[0] == pytest.approx(70)


END = {"step": 110, "images": 14080, "linear_top1": 0.86, "knn_top1": 0.82}  # as the summary has it


def test_an_accuracy_of_the_end_is_not_joined_to_those_of_fewer_images() -> None:
    figure = figures.probe_curve([*METRICS, END], SUMMARY, "linear_top1")
    assert texts(figure) == ["untrained 74.0", "last 80.0", "raw pixels 83.6", "at the end 86.0"]
    assert figure is not None
    along, end = (np.array(line.get_xydata()) for line in figure.axes[0].lines[:2])
    assert len(along) == 6
    assert end.tolist() == [[14080, 86]]


def test_baselines_judged_as_along_the_way_are_what_a_curve_is_held_against() -> None:
    along = (Probe("raw pixels", 0.7, 0.79), Probe("untrained encoder", 0.5, 0.70))
    figure = figures.probe_curve([*METRICS, END], replace(SUMMARY, along=along), "linear_top1")
    assert texts(figure) == ["untrained 70.0", "raw pixels 79.0", "last 80.0"]


def test_where_all_are_judged_alike_the_end_is_a_point_as_any() -> None:
    alike = replace(SUMMARY, along=SUMMARY.probes[:2])
    figure = figures.probe_curve([*METRICS, END], alike, "linear_top1")
    assert texts(figure) == ["untrained 74.0", "raw pixels 83.6", "now 86.0"]


def test_limits_of_collapse_are_drawn_with_their_values() -> None:
    assert "tokens < 10" in texts(figures.rank_curve(METRICS))
    assert "tokens < 0.1" in texts(figures.std_curve(METRICS))


def test_a_loss_over_decades_gets_a_logarithmic_axis() -> None:
    wide, narrow = figures.loss_curve(METRICS), figures.loss_curve(METRICS[1:])
    assert wide is not None
    assert narrow is not None
    assert wide.axes[0].get_yscale() == "log"
    assert narrow.axes[0].get_yscale() == "linear"


def test_bars_start_at_zero_and_name_the_baselines() -> None:
    figure = figures.probe_bars(SUMMARY)
    assert figure is not None
    linear, knn = figure.axes
    assert linear.get_xlim() == (0, 100)
    assert linear.patches[0].get_width() == pytest.approx(86)  # type: ignore[attr-defined]
    assert {text.get_text() for text in knn.texts} == {"82.0", "raw pixels 80.0", "untrained 60.0"}


def test_letters_are_read_on_a_phone() -> None:
    """A picture is 333 pixels wide where the page is 375."""
    drawn = [figures.probe_bars(SUMMARY), figures.probe_curve(METRICS, SUMMARY, "linear_top1")]
    drawn += [figures.rank_curve(METRICS), figures.loss_curve(METRICS), figures.schedule_curves(METRICS)]
    for figure in drawn:
        assert figure is not None
        figure.draw_without_rendering()
        pixels_per_point = 333 / figure.get_figwidth() / 72
        shown = [t for t in figure.findobj(Text) if isinstance(t, Text) and t.get_text() and t.get_visible()]
        assert min(float(text.get_fontsize()) * pixels_per_point for text in shown) >= 12


@pytest.mark.parametrize("value", [0.001, 0.1, 0.159, 0.17, 0.9])
def test_the_number_of_a_bar_is_inside_it_or_beside_it(value: float) -> None:
    """White on white is not read."""
    figure = figures.probe_bars(Summary("run", probes=(Probe("trained target encoder", linear_top1=value),)))
    assert figure is not None
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    (bar,), (number,) = axes.patches, axes.texts
    begin, end = bar.get_window_extent().x0, bar.get_window_extent().x1
    box = number.get_window_extent()
    assert (begin < box.x0 and box.x1 < end) or (end < box.x0 and number.get_color() == figures.INK)


def test_a_running_mean_begins_where_the_loss_does() -> None:
    """It is of what there is, and of 1 in 40 values later: no first value counts many times."""
    losses = [10.0] + [1.0] * 399
    metrics: Metrics = [{"step": n, "images": n, "loss": loss} for n, loss in enumerate(losses)]
    figure = figures.loss_curve(metrics)
    assert figure is not None
    mean = np.array(figure.axes[0].lines[1].get_ydata())
    assert mean[0] == pytest.approx(10)
    assert mean[9] == pytest.approx(1.9)
    assert mean[10:] == pytest.approx(1)


def test_a_loss_of_nothing_is_drawn() -> None:
    with warnings.catch_warnings(action="error"):
        assert figures.loss_curve([{"step": 1, "loss": 0.0}, {"step": 2, "loss": 0.0}]) is not None


def test_to_png_gives_a_png() -> None:
    figure = figures.schedule_curves(METRICS)
    assert figure is not None
    assert figures.to_png(figure).startswith(b"\x89PNG")


@settings(deadline=None)
@given(heights=st.lists(st.floats(0, 1), min_size=1, max_size=8).map(sorted))
def test_labels_stay_apart_and_in_order(heights: list[float]) -> None:
    spread = np.array(figures._spread(list(heights), gap=0.1))
    assert np.all(np.diff(spread) > 0.1 - 1e-9)
    assert spread.max() <= 1

"""The curves and the bars of the report.

A figure is as wide as the column of a phone, so that its letters are read without zooming; the page
lays several side by side on a wider screen. A function returns None when there is nothing to draw.
"""

import io
import math
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from fastjepa.evaluation.collapse import BETWEEN_IMAGES_FALL, RANKME_FALL, TARGET_STD_LOW
from fastjepa.report.load import Metrics, Probe, Summary
from fastjepa.report.verdict import BASELINES, TRAINED, along_the_way

INK, MUTED, FAINT = "#1f2933", "#66707c", "#e3e7eb"
BLUE, LIGHT_BLUE, RED, GREEN = "#17669b", "#6ea0c4", "#b8432f", "#2b7f5c"
WIDTH_IN, HEIGHT_IN, DPI = 3.6, 2.5, 220
FONT = 9.5  # points: 12 pixels or more where the page is 375 wide and a picture 333
_NARROW = 16  # percent: a bar below has no room for its number
_DASHED = (0, (4, 3))

# Lines of the charts: key, name, colour; or key, name, factor.
RANKS = [
    ("token_rankme", "tokens", BLUE),
    ("rankme", "pooled images", INK),
    ("prediction_rankme", "predictions", GREEN),
]
SPREADS = [
    ("target_std", "all tokens", BLUE),
    ("between_image_std", "images", INK),
    ("prediction_std", "predictions", GREEN),
]
SPEEDS = [("images_per_second", "images per second", 1.0), ("data_wait_fraction", "data wait, %", 100.0)]
SCHEDULES = [
    ("lr", "learning rate", 1.0),
    ("weight_decay", "weight decay", 1.0),
    ("momentum", "target momentum", 1.0),
]


def to_png(figure: Figure) -> bytes:
    """Render without a display."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
    return buffer.getvalue()


def loss_curve(metrics: Metrics) -> Figure | None:
    """Loss over images seen: every logged value, and their running mean once there are many."""
    x, loss = series(metrics, "loss")
    if len(x) == 0:
        return None
    figure, axes = _panel(metrics)
    window = max(1, len(loss) // 40)
    mean = _running_mean(loss, window)
    if window > 1:
        axes.plot(x, loss, color=LIGHT_BLUE, linewidth=0.7)
    axes.plot(x, mean, color=BLUE, linewidth=1.6)
    if loss.min() > 0 and loss.max() > 20 * loss.min():
        axes.set_yscale("log")
    elif loss.max() > 0:
        axes.set_ylim(0, 1.05 * loss.max())
    axes.set_ylabel("loss")
    _label_ends(axes, [(mean[-1], f"{mean[-1]:.3g}", BLUE)])
    return figure


def probe_curve(metrics: Metrics, summary: Summary, key: str) -> Figure | None:
    """One probe's accuracy (`linear_top1` or `knn_top1`) over images seen, with its baselines dashed.

    The baselines are those judged as along the way. A run of an older version has only those of the end, and
    beside them, not joined to the others, the accuracy at the end, of as many images.
    """
    along, end = along_the_way(metrics, summary)
    lines = [(along, "now" if not end else "last", BLUE, "o")]
    if not summary.along:
        lines.append((end, "at the end", INK, "D"))
    if not any(len(series(rows, key)[0]) for rows, *_ in lines):
        return None
    figure, axes = _panel(metrics)
    labels = []
    for rows, name, colour, marker in lines:
        x, y = series(rows, key)
        if len(x) == 0:
            continue
        axes.plot(x, 100 * y, color=colour, linewidth=1.6, marker=marker, markersize=3.5)
        labels.append((100 * y[-1], f"{name} {100 * y[-1]:.1f}", colour))
    named = summary.baseline_along if summary.along else summary.probe
    for name, value in _accuracies(named, BASELINES, key):
        axes.axhline(value, color=MUTED, linewidth=1, linestyle=_DASHED)
        labels.append((value, f"{_SHORT[name]} {value:.1f}", INK))
    axes.set_ylabel("top-1 accuracy, %")
    _label_ends(axes, labels)
    return figure


def rank_curve(metrics: Metrics) -> Figure | None:
    """RankMe of tokens, of predictions and of pooled images, and the limit of the first."""
    _, rank = series(metrics, "token_rankme")
    limits = [(RANKME_FALL * rank[0], "tokens")] if len(rank) else []
    return _watched(metrics, RANKS, "RankMe, dimensions", limits)


def std_curve(metrics: Metrics) -> Figure | None:
    """Deviation over all tokens, over images and of the predictions, and the limits of the first two."""
    limits = [(TARGET_STD_LOW, "tokens")] if len(series(metrics, "target_std")[0]) else []
    _, between = series(metrics, "between_image_std")
    if len(between):
        limits.append((BETWEEN_IMAGES_FALL * between[0], "images"))
    return _watched(metrics, SPREADS, "standard deviation", limits)


def speed_curve(metrics: Metrics) -> Figure | None:
    """Images per second, and under it the share of the time spent waiting for data."""
    return _stacked(metrics, SPEEDS)


def schedule_curves(metrics: Metrics) -> Figure | None:
    """Learning rate, weight decay and momentum of the target encoder."""
    return _stacked(metrics, SCHEDULES)


def probe_bars(summary: Summary) -> Figure | None:
    """The trained encoders as bars from zero, the baselines as labelled lines across them."""
    measured = [
        (key, title, bars)
        for key, title in (("linear_top1", "Linear probe"), ("knn_top1", "kNN"))
        if (bars := _accuracies(summary.probe, TRAINED, key))
    ]
    if not measured:
        return None
    figure = Figure(figsize=(WIDTH_IN, 0.3 + 1.2 * len(measured)), layout="constrained")
    for axes, (key, title, bars) in zip(_rows(figure, len(measured)), measured, strict=True):
        _tidy(axes)
        axes.grid(axis="y", visible=False)
        axes.set_title(title, loc="left", fontsize=FONT, weight="bold", color=INK)
        for y, (name, value) in enumerate(bars):
            bar, ink = (BLUE, "white") if name == TRAINED[0] else (LIGHT_BLUE, INK)
            axes.barh(y, value, height=0.66, color=bar)
            at, ink = (1.5, ink) if value >= _NARROW else (value + 1.5, INK)
            axes.text(at, y, f"{value:.1f}", va="center", color=ink, weight="bold", fontsize=FONT)
        # y grows downwards. The labels stand above the bars; the leftmost line gets the lowest label,
        # so that no line crosses the label of another.
        bottom = len(bars) - 0.5
        baselines = sorted(_accuracies(summary.probe, BASELINES, key), key=lambda pair: pair[1])
        for row, (name, value) in enumerate(baselines):
            height = -0.8 - 0.62 * row
            axes.plot([value, value], [height - 0.2, bottom], color=INK, linewidth=1, linestyle=_DASHED)
            align, gap = ("right", -1.5) if value > 50 else ("left", 1.5)
            axes.text(
                value + gap,
                height,
                f"{_SHORT[name]} {value:.1f}",
                ha=align,
                va="center",
                color=INK,
                fontsize=FONT,
            )
        axes.set_xlim(0, 100)
        axes.set_ylim(bottom, -0.7 - 0.62 * len(baselines))
        axes.set_yticks(range(len(bars)), [_SHORT[name] for name, _ in bars])
    axes.set_xlabel("top-1 accuracy, %")
    return figure


_SHORT = {
    "raw pixels": "raw pixels",
    "untrained encoder": "untrained",
    "initial weights": "initial weights",
    "trained encoder": "encoder",
    "trained target encoder": "target",
    "trained context encoder": "context",
}


def _accuracies(
    probe: Callable[[str], Probe | None], names: tuple[str, ...], key: str
) -> list[tuple[str, float]]:
    """(name, percent) of those of `names` that were measured."""
    values = [(name, getattr(probe(name), key, None)) for name in names]
    return [(name, 100 * value) for name, value in values if value is not None]


def _watched(
    metrics: Metrics, lines: list[tuple[str, str, str]], unit: str, limits: list[tuple[float, str]]
) -> Figure | None:
    """Lines (key, name, colour) from zero, and red limits (value, name) that they should stay above."""
    figure, axes = _panel(metrics)
    labels = []
    for key, name, colour in lines:
        x, y = series(metrics, key)
        if len(x):
            axes.plot(x, y, color=colour, linewidth=1.6)
            labels.append((y[-1], f"{name} {y[-1]:.3g}", colour))
    if not labels:
        return None
    for value, name in limits:
        axes.axhline(value, color=RED, linewidth=1, linestyle=_DASHED)
        labels.append((value, f"{name} < {value:.2g}", RED))
    axes.set_ylim(bottom=0)
    axes.set_ylabel(unit)
    _label_ends(axes, labels)
    return figure


def _stacked(metrics: Metrics, panels: list[tuple[str, str, float]]) -> Figure | None:
    """Small panels (key, title, factor) above one another, over the same images."""
    panels = [panel for panel in panels if len(series(metrics, panel[0])[0])]
    if not panels:
        return None
    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained")
    for axes, (key, title, factor) in zip(_rows(figure, len(panels)), panels, strict=True):
        x, y = series(metrics, key)
        y = y * factor
        _tidy(axes)
        axes.plot(x, y, color=BLUE, linewidth=1.4)
        axes.set_title(title, loc="left", fontsize=FONT, color=MUTED, pad=3)
        axes.yaxis.set_major_locator(MaxNLocator(3))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
        if key != "momentum" and y.max() > 0:  # momentum lives between .99 and 1
            axes.set_ylim(0, 1.1 * y.max())
        _label_ends(axes, [(y[-1], f"{y[-1]:.4g}", BLUE)])
        _images_axis(axes, metrics)
        axes.label_outer()
    return figure


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Of each value and those before it, `window` at most: fewer at the start, to begin where they do."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(0, ends - window)
    return np.asarray((sums[ends] - sums[begins]) / (ends - begins))


def _panel(metrics: Metrics) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained")
    (axes,) = _rows(figure, 1)
    _tidy(axes)
    _images_axis(axes, metrics)
    return figure, axes


def _rows(figure: Figure, count: int) -> list[Axes]:
    return list(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0])


def _images_axis(axes: Axes, metrics: Metrics) -> None:
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel("images seen" if metrics and "images" in metrics[0] else "step")


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(length=0, colors=MUTED, labelsize=FONT)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=MUTED, fontsize=FONT)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)


def _label_ends(axes: Axes, labels: list[tuple[float, str, str]]) -> None:
    """Write (value, text, colour) to the right of the axes, moved apart where values lie close together."""
    labels = sorted(labels)
    axes.autoscale_view()  # limits are set lazily, and the last line drawn would not count yet
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = _spread([float(to_axes.transform((0, value))[1]) for value, _, _ in labels], gap=0.1)
    for height, (_, text, colour) in zip(heights, labels, strict=True):
        axes.text(1.02, height, text, color=colour, transform=axes.transAxes, va="center", fontsize=FONT)


def _spread(heights: list[float], gap: float) -> list[float]:
    """Ascending heights moved at least `gap` apart, upwards first, then back down below 1."""
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    ceiling = 1.0
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] - gap
    return heights


def series(metrics: Metrics, key: str) -> tuple[np.ndarray, np.ndarray]:
    """What was logged under `key` and is finite, and where: after how many images, or steps."""
    points = [
        (row.get("images", row["step"]), row[key]) for row in metrics if math.isfinite(row.get(key, math.nan))
    ]
    x, y = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return x, y

"""The figures: accuracy against seconds and FLOPs, what detail costs, and what the detail looks like."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from bench.accuracy.corruptions import KINDS, corrupt
from bench.accuracy.plan import LEARNERS, TRAINED, Condition
from bench.accuracy.store import Result
from bench.accuracy.summary import MEASURES, NAMES, Band, CurvePoint, Measure, corrupted, curve, final, loss
from fastjepa.data.fashion_mnist import FashionMNIST
from fastjepa.report.figures import BLUE, FAINT, INK, MUTED, RED

_COLOURS = {"jepa": BLUE, "mae": RED, "pixels": INK, "untrained": MUTED}
_DASHES = {"jepa": "-", "mae": "-", "pixels": "--", "untrained": ":"}
_SHOWN = 4  # images of each kind and strength


def against_cost(results: Sequence[Result], cost: Callable[[CurvePoint], float], label: str) -> Figure:
    """Accuracy on clean images against what the training took, a band over seeds, baselines as lines."""
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    for axes, (measure, title) in zip(figure.subplots(1, 2), MEASURES.items(), strict=True):
        for learner in TRAINED:
            points = curve(results, learner, measure)
            _band(axes, [cost(point) for point in points], [point.accuracy for point in points], learner)
        for learner in ("pixels", "untrained"):
            band = final(results, learner, Condition(), measure)
            if band is not None:
                style = {"color": _COLOURS[learner], "linestyle": _DASHES[learner], "label": _name(learner)}
                axes.axhline(100 * band.mean, linewidth=1.2, **style)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        _tidy(axes, title, label, "top-1 accuracy, %")
    return figure


def against_strength(results: Sequence[Result]) -> Figure | None:
    """Points lost, and what is left, against the strength of each kind; None without any."""
    kinds = corrupted(results)
    if not kinds:
        return None
    figure = Figure(figsize=(3.6 * len(kinds) + 0.6, 6.2), layout="constrained")
    measure: Measure = "linear_top1"
    grid = figure.subplots(2, len(kinds), squeeze=False, sharex="col", sharey="row")
    for column, (kind, strengths) in enumerate(kinds.items()):
        for learner in LEARNERS:
            start = final(results, learner, Condition(), measure)
            left = [(0.0, start)] if start else []
            lost = [(0.0, Band(0.0, 0.0, 0.0, start.seeds))] if start else []
            for strength in strengths:
                condition = Condition(kind, strength)
                if (band := final(results, learner, condition, measure)) is not None:
                    left.append((strength, band))
                if (band := loss(results, learner, condition, measure)) is not None:
                    lost.append((strength, band))
            for axes, series in ((grid[0, column], lost), (grid[1, column], left)):
                _band(axes, [x for x, _ in series], [band for _, band in series], learner)
        _tidy(grid[0, column], kind, "", "points lost by the linear probe" if column == 0 else "")
        _tidy(grid[1, column], "", "strength", "linear probe, %" if column == 0 else "")
    return figure


def samples(strengths: Sequence[float], seed: int = 0) -> Figure:
    """The same garments under each kind of detail, in rising strength from left to right."""
    garments = FashionMNIST(split="train").images
    numbers = torch.tensor([0, 1, 16, 18])[:_SHOWN]
    columns = [0.0, *strengths]
    figure = Figure(figsize=(2.2 * len(columns), 2.25 * len(KINDS)), layout="constrained")
    for axes, (kind, strength) in zip(
        figure.subplots(len(KINDS), len(columns), squeeze=False).flat,
        [(kind, strength) for kind in KINDS for strength in columns],
        strict=True,
    ):
        images = corrupt(garments[numbers], numbers, kind, strength, seed, garments)[:, 0]
        framed = F.pad(images, (1, 1, 1, 1), value=255)  # [4, H + 2, W + 2]
        shown = torch.cat([torch.cat([*framed[:2]], 1), torch.cat([*framed[2:]], 1)])
        axes.imshow(shown.numpy(), "gray", vmin=0, vmax=255)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(f"{kind} {strength:g}", fontsize=8.5, color=INK)
    return figure


def _band(axes: Axes, x: list[float], bands: list[Band], learner: str) -> None:
    if not bands:
        return
    style: dict[str, Any] = {"color": _COLOURS[learner], "linestyle": _DASHES[learner]}
    axes.plot(
        x,
        [100 * band.mean for band in bands],
        marker="o",
        markersize=3,
        linewidth=1.6,
        label=_name(learner),
        **style,
    )
    low, high = [100 * band.low for band in bands], [100 * band.high for band in bands]
    axes.fill_between(x, low, high, color=_COLOURS[learner], alpha=0.18, linewidth=0)


def _name(learner: str) -> str:
    return NAMES[learner].removeprefix("an ")


def _tidy(axes: Axes, title: str, x: str, y: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel(x, fontsize=9, color=MUTED)
    axes.set_ylabel(y, fontsize=9, color=MUTED)
    axes.tick_params(labelsize=8.5, colors=MUTED)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7.5, frameon=False)

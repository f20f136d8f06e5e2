"""What a predictor says of hidden patches: how near it comes, and what is near to it."""

import math

import matplotlib as mpl
import numpy as np
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from torch import Tensor

from fastjepa.evaluation.showing import Predictions, Retrieved
from fastjepa.report.load import Snapshot
from fastjepa.report.panels import (
    AGREEMENT,
    VEIL,
    Panels,
    frame,
    heat,
    on_grid,
    panels,
    rows_of,
    show,
    under,
    veiled,
)
from fastjepa.report.patches import BLOCK_COLOURS, rgb


def prediction_pictures(snapshot: Snapshot, predictions: Predictions, targets: Tensor) -> list[Figure]:
    """Centred cosines over four images to a figure, a row per block, the mean of each block under it.

    Args:
        snapshot: whose images they are.
        predictions: of it.
        targets: int64 [M, n, P], the blocks.
    """
    images, places = rgb(snapshot.images), targets.numpy()
    centred = predictions.centred.float().numpy()  # [M, n, P]
    colours, norm, ticks = _scale_of(centred)
    figures = []
    for chosen in rows_of(len(images)):
        sheet = _sheet(1 + len(places), snapshot, has_text=True)
        sheet.name_row(0, "image")
        for axes, image in zip(sheet.axes[0], chosen, strict=False):
            show(axes, images[image], snapshot.grid)
        for block, (there, values) in enumerate(zip(places, centred, strict=True)):
            colour = colour_of(block)
            sheet.name_row(1 + block, f"block {block + 1}", colour)
            for axes, image in zip(sheet.axes[1 + block], chosen, strict=False):
                cells = on_grid(there[image], values[image], snapshot.grid)
                heat(axes, images[image], cells, colours, norm)
                block_of = np.zeros(snapshot.grid, dtype=bool)
                block_of.flat[there[image]] = True
                frame(axes, block_of, colour)
                mean = float(values[image].mean())
                words = f"{mean:.2f}".replace("-", "\N{MINUS SIGN}") if math.isfinite(mean) else "not finite"
                under(axes, words)
        sheet.scale(colours, norm, "1: exact; 0: as near as the mean", ticks)
        figures.append(sheet.figure)
    return figures


def retrieval_pictures(snapshot: Snapshot, retrieved: Retrieved, targets: Tensor) -> list[Figure]:
    """Images with their hidden patches filled from the bank, four to a figure, a row for each."""
    titles = (
        "image",
        "not\nhidden",
        "by\nprediction",
        "by true\ntarget",
        "by mean\ntarget",
    )
    images = rgb(snapshot.images)
    filled = [rgb(some) for some in (retrieved.by_prediction, retrieved.by_target, retrieved.by_mean)]
    figures = []
    for chosen in rows_of(len(images)):
        sheet = panels(len(chosen), len(titles), _tall(images), titles=titles)
        for row, image in zip(sheet.axes, chosen, strict=True):
            hidden = np.zeros(snapshot.grid, dtype=bool)
            hidden.flat[targets[:, image].numpy()] = True
            pictures = [images[image], veiled(images[image], hidden), *(some[image] for some in filled)]
            for number, (axes, picture) in enumerate(zip(row, pictures, strict=True)):
                show(axes, picture, snapshot.grid)
                if number > 1:
                    frame(axes, hidden, "#" + "".join(f"{round(255 * c):02x}" for c in VEIL), 0.7)
        figures.append(sheet.figure)
    return figures


def example_picture(retrieved: Retrieved) -> Figure:
    """One patch of each block amid its surroundings, and the bank patches nearest to it."""
    k = (retrieved.examples.shape[1] - 1) // 2
    titles = ["hidden"] + [""] * (2 * k)
    titles[1 + k // 2], titles[1 + k + k // 2] = "by prediction", "by true target"
    sheet = panels(len(retrieved.examples), 1 + 2 * k, titles=tuple(titles), wider_after=(0, k))
    middle = np.zeros((3, 3), dtype=bool)
    middle[1, 1] = True
    for row, cells, block in zip(
        sheet.axes, retrieved.examples, retrieved.example_block.tolist(), strict=True
    ):
        for axes, picture in zip(row, rgb(cells), strict=True):
            show(axes, picture, (3, 3))
            frame(axes, middle, colour_of(block))
    return sheet.figure


def colour_of(block: int) -> str:
    """As in the picture of the masks."""
    return BLOCK_COLOURS[block % len(BLOCK_COLOURS)]


def _sheet(rows: int, snapshot: Snapshot, has_text: bool) -> Panels:
    tall = snapshot.images.shape[2] / snapshot.images.shape[3]
    return panels(rows, 4, tall, left_in=0.22, has_text=has_text, has_scale=True)


def _tall(images: np.ndarray) -> float:
    return float(images.shape[1] / images.shape[2])


def _scale_of(values: np.ndarray) -> tuple[Colormap, Normalize, list[float]]:
    """Colours from -1 to 1, or where nearly all are well above 0 from where these begin, so that they differ.

    The few below have the colour of the lower end.
    """
    finite = values[np.isfinite(values)]  # a predictor may diverge before the target encoder does
    low = math.floor(10 * float(np.quantile(finite, 0.05))) / 10 if finite.size else -1.0
    if low <= 0:
        return AGREEMENT, Normalize(-1, 1), [-1, -0.5, 0, 0.5, 1]
    low = min(low, 0.9)
    return mpl.colormaps["YlGnBu"], Normalize(low, 1), [low, (low + 1) / 2, 1]

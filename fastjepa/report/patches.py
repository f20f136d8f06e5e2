"""Pictures of images cut into patches: the masks as sampled, and features as colours."""

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from fastjepa.evaluation.pictures import patch_pca
from fastjepa.report.figures import FONT, WIDTH_IN
from fastjepa.report.load import Snapshot

# Okabe and Ito's colours: told apart by colour-blind eyes too.
BLOCK_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_ACROSS = 4  # images beside one another: on a phone each is still a finger wide
_MOST_IMAGES = 8
_HIDDEN = 0.25  # how much of a patch outside the context shines through
_VEIL = (0.67, 0.72, 0.77)  # neither black nor white, which both occur inside images

Segment = tuple[tuple[float, float], tuple[float, float]]


def mask_pictures(snapshot: Snapshot) -> list[Figure]:
    """What the context encoder sees, with the blocks to predict outlined; four images to a figure."""
    images = rgb(snapshot.images)
    return [_mask_row(snapshot, images, chosen) for chosen in _rows_of_images(len(images))]


def comparable(snapshots: list[Snapshot]) -> tuple[list[Snapshot], list[str]]:
    """The snapshots whose features can stand under one another, and why the others cannot, in words.

    They show the images of the last one with finite features.
    """
    finite = [snapshot for snapshot in snapshots if snapshot.features.isfinite().all()]
    kept, reasons = [], []
    for snapshot in snapshots:
        if not snapshot.features.isfinite().all():
            reasons.append(f"{when(snapshot)}, whose features are not finite: the run had diverged")
        elif snapshot.grid != finite[-1].grid or not snapshot.images.equal(finite[-1].images):
            reasons.append(f"{when(snapshot)}, which is of other images or patches than {when(finite[-1])}")
        else:
            kept.append(snapshot)
    return kept, reasons


def feature_colours(snapshots: list[Snapshot]) -> list[np.ndarray]:
    """Patch features as colours, [n, h, w, 3] for each snapshot, turned to agree with the last.

    Args:
        snapshots: as `comparable` leaves them, at least one.
    """
    return [colours.numpy() for colours in patch_pca([s.features for s in snapshots], snapshots[0].grid)]


def agreement(colours: np.ndarray, last: np.ndarray) -> float:
    """Mean correlation of the channels of two [n, h, w, 3]: 1 where they are the same, about 0 by luck.

    A channel without variance agrees with nothing.
    """
    rows = [picture.reshape(-1, 3).astype(np.float64) for picture in (colours, last)]
    one, other = (row - row.mean(axis=0) for row in rows)
    size = np.sqrt((one**2).sum(axis=0) * (other**2).sum(axis=0))  # [3]
    return float(np.divide((one * other).sum(axis=0), size, out=np.zeros(3), where=size > 0).mean())


def when(snapshot: Snapshot) -> str:
    """The step of a snapshot in words."""
    return "start" if snapshot.step == 0 else f"step {snapshot.step:,}"


def feature_pictures(snapshots: list[Snapshot], colours: list[np.ndarray]) -> list[Figure]:
    """Images, and under them their features as colours, a row per snapshot; four images to a figure."""
    names = ["image", *map(when, snapshots)]
    images = rgb(snapshots[0].images)
    rows = [images, *colours]
    figures = []
    for chosen in _rows_of_images(len(images)):
        figure, grid = _picture_grid(len(rows), images.shape[1] / images.shape[2], left_in=0.24)
        for row, (pictures, name) in enumerate(zip(rows, names, strict=True)):
            for axes, index in zip(grid[row], chosen, strict=False):
                axes.imshow(pictures[index], interpolation="nearest", extent=(0, 1, 1, 0), aspect="auto")
            first = grid[row, 0]
            first.text(
                -0.06, 0.5, name, transform=first.transAxes, rotation=90, ha="right", va="center", size=FONT
            )
        figures.append(figure)
    return figures


def outline(block: np.ndarray, inset: float) -> list[Segment]:
    """The border of a set of patches as lines, drawn `inset` inside it.

    Blocks that share a border stay visible when each has an inset of its own.

    Args:
        block: bool [h, w].
        inset: in patches, below 0.5.

    Returns:
        Segments ((x, y), (x, y)) in patches, y downwards, that join at the corners.
    """
    padded = np.pad(block, 1)
    segments: list[Segment] = []
    for row, column in np.argwhere(block):
        y, x = row + 1, column + 1
        for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            if padded[y + down, x + right]:
                continue
            ends = []
            for side in (-1, 1):  # along the border
                beside = padded[y + side * abs(right), x + side * abs(down)]
                beyond = padded[y + down + side * abs(right), x + right + side * abs(down)]
                # The border turns inwards (a corner of the set), goes straight on, or turns outwards.
                reach = 0.5 - inset if not beside else 0.5 + inset if beyond else 0.5
                along, across = side * reach, 0.5 - inset
                end_x = column + 0.5 + right * across + abs(down) * along
                end_y = row + 0.5 + down * across + abs(right) * along
                ends.append((float(end_x), float(end_y)))
            segments.append((ends[0], ends[1]))
    return segments


def _mask_row(snapshot: Snapshot, images: np.ndarray, chosen: range) -> Figure:
    down, across = snapshot.grid
    figure, grid = _picture_grid(1, images.shape[1] / images.shape[2], left_in=0.0)
    for axes, index in zip(grid[0], chosen, strict=False):
        seen = _as_grid(snapshot.context[index], snapshot.grid)
        veiled = _HIDDEN * images[index] + (1 - _HIDDEN) * np.array(_VEIL)
        shown = np.where(_enlarge(seen, images.shape[1:3])[..., None], images[index], veiled)
        axes.imshow(shown, interpolation="nearest", extent=(0, across, down, 0), aspect="auto")
        if snapshot.targets is not None:
            for number, tokens in enumerate(snapshot.targets[:, index]):
                lines = outline(_as_grid(tokens, snapshot.grid), inset=0.06 + 0.09 * (number % 4))
                colour = BLOCK_COLOURS[number % len(BLOCK_COLOURS)]
                axes.add_collection(
                    LineCollection(lines, colors=colour, linewidths=1.6, capstyle="projecting")
                )
    return figure


def _picture_grid(rows: int, height_to_width: float, left_in: float) -> tuple[Figure, np.ndarray]:
    """A figure of `rows` by `_ACROSS` empty axes, as wide as the curves, every cell of the images' shape."""
    gap_in = 0.05
    cell_in = (WIDTH_IN - left_in - gap_in * (_ACROSS - 1)) / _ACROSS
    height_in = rows * cell_in * height_to_width + gap_in * (rows - 1)
    figure = Figure(figsize=(WIDTH_IN, height_in))
    grid = figure.subplots(
        rows,
        _ACROSS,
        squeeze=False,
        gridspec_kw={
            "left": left_in / WIDTH_IN,
            "right": 1,
            "bottom": 0,
            "top": 1,
            "wspace": gap_in / cell_in,
            "hspace": gap_in / (cell_in * height_to_width),
        },
    )
    for axes in grid.flat:
        axes.set_axis_off()
    return figure, grid


def _rows_of_images(count: int) -> list[range]:
    shown = min(count, _MOST_IMAGES)
    return [range(start, min(start + _ACROSS, shown)) for start in range(0, shown, _ACROSS)]


def _as_grid(tokens: Tensor, grid: tuple[int, int]) -> np.ndarray:
    present = np.zeros(grid, dtype=bool)
    present.flat[tokens.numpy()] = True
    return present


def _enlarge(block: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[h, w] patches as [H, W] pixels."""
    return block.repeat(size[0] // block.shape[0], axis=0).repeat(size[1] // block.shape[1], axis=1)


def rgb(images: Tensor) -> np.ndarray:
    """uint8 [n, C, H, W] -> [n, H, W, 3] in [0, 1]; of 2 or 4 channels the first is shown."""
    channels = images if images.shape[1] == 3 else images[:, :1].expand(-1, 3, -1, -1)
    return channels.permute(0, 2, 3, 1).numpy() / 255

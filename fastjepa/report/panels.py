"""Small pictures in rows and columns, with words at their edges and one scale below them all."""

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from fastjepa.report.figures import BLUE, FONT, INK, MUTED, RED, WIDTH_IN
from fastjepa.report.patches import outline

AGREEMENT = LinearSegmentedColormap.from_list("agreement", [RED, "#f4f4f2", BLUE])  # -1, 0, 1
VEIL = (0.67, 0.72, 0.77)  # neither black nor white, which both occur inside images
_GAP_IN, _TEXT_IN, _BAR_IN = 0.05, 0.17, 0.44
_LINE_IN = 0.15  # of a title
_LETTER = 0.5  # of its size, is about how wide a letter is
_SMALLEST = 7.0  # points: of a name that has no room at `FONT`


@dataclass(frozen=True)
class Panels:
    """A figure as wide as the column of a phone, and its empty axes."""

    figure: Figure
    axes: np.ndarray  # [rows, columns]
    height_in: float

    def name_row(self, row: int, name: str, colour: str = INK) -> None:
        axes = self.axes[row, 0]
        axes.text(
            -0.06, 0.5, name, transform=axes.transAxes, rotation=90, ha="right", va="center",
            size=FONT, color=colour,
        )  # fmt: skip

    def scale(self, colours: Colormap, norm: Normalize, words: str, ticks: list[float]) -> None:
        """A bar below all panels."""
        bar = self.figure.add_axes((0.14, 0.36 / self.height_in, 0.72, 0.07 / self.height_in))
        self.figure.colorbar(ScalarMappable(norm, colours), cax=bar, orientation="horizontal", ticks=ticks)
        bar.tick_params(labelsize=FONT, length=2, pad=1, color=MUTED, labelcolor=MUTED)
        bar.set_xlabel(words, size=FONT, color=MUTED, labelpad=1)


def panels(
    rows: int,
    columns: int,
    height_to_width: float = 1.0,
    *,
    titles: tuple[str, ...] = (),
    left_in: float = 0.0,
    has_text: bool = False,
    has_scale: bool = False,
    wider_after: tuple[int, ...] = (),
) -> Panels:
    """Empty panels, all of one size.

    Args:
        rows, columns: how many.
        height_to_width: of a panel.
        titles: a line or two above each column.
        left_in: inches for the names of rows.
        has_text: leaves room for a line under each panel.
        has_scale: leaves room for `Panels.scale`.
        wider_after: columns with a wider gap behind them.
    """
    top_in = (0.05 + _LINE_IN * max(title.count("\n") + 1 for title in titles)) if titles else 0.0
    below_in = _GAP_IN + _TEXT_IN * has_text
    bottom_in = _BAR_IN + 0.05 if has_scale else 0.0
    wide_in = 0.12
    gaps_in = _GAP_IN * (columns - 1) + wide_in * len(wider_after)
    cell_in = (WIDTH_IN - left_in - gaps_in) / columns
    height_in = top_in + rows * (cell_in * height_to_width + below_in) + bottom_in
    figure = Figure(figsize=(WIDTH_IN, height_in))
    axes = np.empty((rows, columns), dtype=object)
    for row in range(rows):
        y = height_in - top_in - row * (cell_in * height_to_width + below_in) - cell_in * height_to_width
        for column in range(columns):
            x = left_in + column * (cell_in + _GAP_IN) + wide_in * sum(column > edge for edge in wider_after)
            box = x / WIDTH_IN, y / height_in, cell_in / WIDTH_IN, cell_in * height_to_width / height_in
            axes[row, column] = figure.add_axes(box)
            axes[row, column].set_axis_off()
            if row == 0 and titles:
                axes[0, column].set_title(titles[column], size=FONT, color=INK, pad=2, linespacing=1.05)
    return Panels(figure, axes, height_in)


def show(axes: Axes, picture: np.ndarray, grid: tuple[int, int] = (1, 1)) -> None:
    """A picture [H, W, 3] in 0 to 1 that fills the panel; positions on it are counted in patches."""
    axes.imshow(picture, interpolation="nearest", extent=(0, grid[1], grid[0], 0), aspect="auto")


def heat(
    axes: Axes,
    picture: np.ndarray,
    values: np.ndarray,
    colours: Colormap,
    norm: Normalize,
    opacity: float = 0.8,
) -> None:
    """A number for each patch, [h, w], as colours over a faded picture; nan leaves the picture."""
    grid = values.shape[0], values.shape[1]
    faded = 0.35 * picture.mean(axis=2, keepdims=True) + 0.65 * np.array(VEIL)
    show(axes, faded, grid)
    rgba = colours(norm(np.nan_to_num(values)))  # [h, w, 4]
    rgba[..., 3] = np.where(np.isnan(values), 0.0, opacity)
    axes.imshow(rgba, interpolation="nearest", extent=(0, grid[1], grid[0], 0), aspect="auto")


def under(axes: Axes, words: str, colour: str = MUTED) -> None:
    """A line under a panel, as it stands: names of classes may have dollars, and are no formulas."""
    room = 72 * axes.get_position().width * WIDTH_IN / (_LETTER * max(1, len(words)))  # points
    size = min(FONT, max(_SMALLEST, room))
    axes.text(
        0.5, -0.02, words, transform=axes.transAxes, ha="center", va="top", size=size, color=colour,
        parse_math=False,
    )  # fmt: skip


def frame(axes: Axes, block: np.ndarray, colour: str, width: float = 1.4) -> None:
    """The border of a set of patches, bool [h, w]."""
    lines = outline(block, inset=0.04)
    axes.add_collection(LineCollection(lines, colors=colour, linewidths=width, capstyle="projecting"))


def rows_of(count: int, at_once: int = 4, most: int = 8) -> list[range]:
    """Images by number, a few to a figure."""
    shown = min(count, most)
    return [range(first, min(first + at_once, shown)) for first in range(0, shown, at_once)]


def on_grid(places: np.ndarray, values: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Values of some places [P] as fp64 [h, w], nan elsewhere."""
    out = np.full(grid, np.nan)
    out.flat[places] = values
    return out


def veiled(picture: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """A picture [H, W, 3] with the patches hidden, bool [h, w], painted over."""
    height, width = hidden.shape
    mask = hidden.repeat(picture.shape[0] // height, axis=0).repeat(picture.shape[1] // width, axis=1)
    return np.where(mask[..., None], np.array(VEIL), picture)

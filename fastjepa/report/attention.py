"""Where the encoder looks in its last block."""

import math

import matplotlib as mpl
import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from fastjepa.evaluation.showing import Attended
from fastjepa.report.load import Snapshot
from fastjepa.report.panels import frame, heat, panels, rows_of, show
from fastjepa.report.patches import rgb

_COLOURS = mpl.colormaps["inferno"]
_MOST_HEADS = 4
_HIGH = 0.98  # of the shares, what lies below the top of the scale: one patch must not set it
_MARK = "#00d5ff"


def attention_pictures(snapshot: Snapshot, attended: Attended) -> list[Figure]:
    """The means over the heads, four images to a figure; at last some heads apart, for the first images."""
    rows = [("from patch", attended.from_patch), ("received", attended.received)]
    if attended.from_class.shape[1]:
        rows.append(("class token", attended.from_class))
    means = [(name, shares.float().mean(dim=1).numpy()) for name, shares in rows]
    images = len(snapshot.images)
    figures = [_figure(snapshot, attended, means, chosen) for chosen in rows_of(images)]
    heads = attended.from_patch.shape[1]
    few = range(min(_MOST_HEADS, heads))
    apart = [
        (f"head {number * heads // len(few) + 1}", attended.from_patch[:, number * heads // len(few)].numpy())
        for number in few
    ]
    return [*figures, _figure(snapshot, attended, apart, rows_of(images)[0])]


def _figure(
    snapshot: Snapshot, attended: Attended, rows: list[tuple[str, np.ndarray]], chosen: range
) -> Figure:
    images, place = rgb(snapshot.images), int(attended.place)
    shares = np.concatenate([maps.ravel() for _, maps in rows]).astype(float)
    high = float(np.quantile(shares[np.isfinite(shares)], _HIGH)) if np.isfinite(shares).any() else 0.0
    top = max(2.0, math.ceil(10 * high) / 10)  # a number that the scale can show
    norm = Normalize(0, top)
    sheet = panels(1 + len(rows), 4, images.shape[1] / images.shape[2], left_in=0.22, has_scale=True)
    mark = np.zeros(snapshot.grid, dtype=bool)
    mark.flat[place] = True
    sheet.name_row(0, "image")
    for axes, image in zip(sheet.axes[0], chosen, strict=False):
        show(axes, images[image], snapshot.grid)
        frame(axes, mark, _MARK)
    for number, (name, maps) in enumerate(rows, start=1):
        sheet.name_row(number, name)
        for axes, image in zip(sheet.axes[number], chosen, strict=False):
            cells = maps[image].astype(float).reshape(snapshot.grid)
            heat(axes, images[image], cells, _COLOURS, norm, opacity=0.75)
            if name.startswith(("from", "head")):
                frame(axes, mark, _MARK)
    words = f"1: an equal share for all; {top:.3g}: or more"
    sheet.scale(_COLOURS, norm, words, [0, 1, top])
    return sheet.figure

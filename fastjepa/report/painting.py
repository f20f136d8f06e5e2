"""What a masked autoencoder paints where it does not see."""

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from fastjepa.evaluation.showing import Painted
from fastjepa.report.load import Snapshot
from fastjepa.report.panels import AGREEMENT, heat, on_grid, panels, rows_of, show, under, veiled
from fastjepa.report.patches import rgb

_SCALE = Normalize(-1, 1)


def painting_pictures(snapshot: Snapshot, painted: Painted, hidden: Tensor) -> list[Figure]:
    """Images, what is seen, painted and given away, and the correlation in each hidden patch; a row for each.

    Args:
        snapshot: whose images they are.
        painted: of it.
        hidden: int64 [n, P].
    """
    given = "its mean\nalone" if painted.is_normalised else "mean of\nthe seen"
    titles = ("image", "seen", "painted", given, "match")
    images, made, left = (rgb(some) for some in (snapshot.images, painted.painted, painted.given))
    agreement = painted.correlation.float().numpy()  # [n, P]
    figures = []
    for chosen in rows_of(len(images)):
        tall = images.shape[1] / images.shape[2]
        sheet = panels(len(chosen), 5, tall, titles=titles, has_text=True, has_scale=True)
        for row, image in zip(sheet.axes, chosen, strict=True):
            cells = on_grid(hidden[image].numpy(), agreement[image], snapshot.grid)
            mask = np.zeros(snapshot.grid, dtype=bool)
            mask.flat[hidden[image].numpy()] = True
            pictures = (images[image], veiled(images[image], mask), made[image], left[image])
            for axes, picture in zip(row, pictures, strict=False):
                show(axes, picture, snapshot.grid)
            heat(row[4], images[image], cells, AGREEMENT, _SCALE)
            if np.isfinite(cells).any():
                under(row[4], f"{np.nanmean(cells):.2f}".replace("-", "\N{MINUS SIGN}"))
        words = "correlation: 1 exact, 0 a blank patch"
        sheet.scale(AGREEMENT, _SCALE, words, [-1, -0.5, 0, 0.5, 1])
        figures.append(sheet.figure)
    return figures

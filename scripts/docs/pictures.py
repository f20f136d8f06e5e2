"""The pictures of the README and of docs/how_it_works.md, drawn from a run and from the mask sampler.

    python -m scripts.docs.pictures runs/fashion_mnist

writes first_run.png, jepa_masks.png, jepa_curves.png and jepa_features.png into docs/images.
"""

import argparse
import io
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from fastjepa.evaluation import patch_pca
from fastjepa.masks import Masks, MultiBlockMasks
from fastjepa.masks.multiblock import Mode
from fastjepa.report import figures, predictions
from fastjepa.report.load import Run, load_run

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
GRID = (14, 14)  # of 224 pixels in patches of 16
BATCH, SHOWN = 64, 4
CONTEXT, TARGET, NEITHER = "#4477aa", "#ee9944", "#eceff1"
MODES: tuple[Mode, ...] = ("truncate", "budget", "packed")


def masks_figure() -> Figure:
    """The first images of a batch under each mode; the same seed, epoch and step."""
    figure = Figure(figsize=(7.2, 6.0), layout="constrained")
    axes = figure.subplots(len(MODES), SHOWN)
    for row, mode in enumerate(MODES):
        sampler = MultiBlockMasks(GRID, mode=mode, seed=3)
        masks = sampler.sample(torch.arange(BATCH), step=1)
        for column in range(SHOWN):
            seen = _context(masks, column)
            _draw(axes[row, column], seen, masks.targets[:, column].flatten())
            axes[row, column].set_title(f"{len(seen)} tokens", fontsize=9)
        axes[row, 0].set_ylabel(mode, fontsize=11)
    return figure


def _context(masks: Masks, image: int) -> torch.Tensor:
    """Patches in sight of one image: int64 [K]."""
    if masks.cu_seqlens is None:
        return masks.context[image]
    return masks.context[masks.cu_seqlens[image] : masks.cu_seqlens[image + 1]]


def _draw(axes: Axes, seen: torch.Tensor, asked: torch.Tensor) -> None:
    colours = np.array([to_rgb(NEITHER)] * (GRID[0] * GRID[1]))  # [N, 3]
    colours[asked.numpy()] = to_rgb(TARGET)
    colours[seen.numpy()] = to_rgb(CONTEXT)
    axes.imshow(colours.reshape(*GRID, 3), interpolation="nearest")
    axes.set_xticks(np.arange(-0.5, GRID[1]), [])
    axes.set_yticks(np.arange(-0.5, GRID[0]), [])
    axes.tick_params(length=0)
    axes.grid(color="white", linewidth=0.8)
    for side in axes.spines.values():
        side.set_visible(False)


def curves_figure(run: Run) -> Figure:
    """Loss, and what kNN and RankMe say at the same time."""
    figure = Figure(figsize=(7.2, 2.5), layout="constrained")
    named = {"loss": "loss", "knn_top1": "kNN top-1", "rankme": "RankMe"}
    for axes, (key, title) in zip(figure.subplots(1, len(named)), named.items(), strict=True):
        rows = [row for row in run.metrics if key in row]
        axes.plot(
            [row["step"] for row in rows],
            [row[key] for row in rows],
            color=CONTEXT,
            marker="" if key == "loss" else "o",
            markersize=4,
        )
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def features_figure(run: Run) -> Figure:
    """Images, and the first three principal components of their patch features at each snapshot."""
    images = run.snapshots[0].images[:8]
    times = patch_pca([snapshot.features for snapshot in run.snapshots], run.snapshots[0].grid)
    names = ["image", *(f"step {snapshot.step:,}" for snapshot in run.snapshots)]
    figure = Figure(figsize=(7.2, 0.95 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), len(images))
    for row, pictures in enumerate([images.movedim(1, -1) / 255, *times]):
        for column in range(len(images)):
            axes[row, column].imshow(pictures[column].numpy(), cmap="gray", interpolation="nearest")
            axes[row, column].set_xticks([])
            axes[row, column].set_yticks([])
        axes[row, 0].set_ylabel(names[row], fontsize=8)
    return figure


def first_run(run: Run) -> Image.Image:
    """Two pictures of the report in a row: the probes, and predictions as patches of other images."""
    last = run.snapshots[-1]
    bars = figures.probe_bars(run.summary)
    if bars is None or last.showing.retrieved is None or last.targets is None:
        raise SystemExit("this picture is of an I-JEPA run that has ended and was judged")
    retrieved = predictions.retrieval_pictures(last, last.showing.retrieved, last.targets)[0]
    drawn = [Image.open(io.BytesIO(figures.to_png(figure))).convert("RGB") for figure in (bars, retrieved)]
    gap = 40
    width, height = sum(picture.width for picture in drawn) + gap, max(picture.height for picture in drawn)
    sheet = Image.new("RGB", (width, height), "white")
    left = 0
    for picture in drawn:
        sheet.paste(picture, (left, (height - picture.height) // 2))
        left += picture.width + gap
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser("python -m scripts.docs.pictures", description=__doc__)
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="the folder of a run, as `make train` leaves it"
    )
    run = load_run(parser.parse_args().run)
    first_run(run).save(IMAGES / "first_run.png", optimize=True)
    print(f"Wrote {IMAGES / 'first_run.png'}")
    for name, figure in (
        ("jepa_masks", masks_figure()),
        ("jepa_curves", curves_figure(run)),
        ("jepa_features", features_figure(run)),
    ):
        figure.savefig(IMAGES / f"{name}.png", dpi=150, metadata={"Software": None})
        print(f"Wrote {IMAGES / name}.png")


if __name__ == "__main__":
    main()

"""From a run folder to its page: which pictures there are, and the words beside them."""

import os
import re
from dataclasses import fields
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from fastjepa.evaluation.collapse import CollapseSigns, collapse_warning
from fastjepa.report import figures, patches
from fastjepa.report.load import Run, Snapshot, load_run
from fastjepa.report.page import Page, Picture, render
from fastjepa.report.verdict import verdict

_ALONG_THE_WAY = "On fewer images than the final probe. Dashed: the baselines, once the run has ended."
_SIGNS = tuple(field.name for field in fields(CollapseSigns))


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report/index.html`, and its pictures beside it as PNG files.

    Reads `config.yaml`, `metrics.jsonl`, `report/summary.json` and `report/snapshots/*.safetensors`.
    It may be called while a run is going or after it broke off: the page says what is missing. The page
    holds its pictures and needs no other file. A file is replaced in one step, so that a reader sees
    the old one or the new one.

    Args:
        run_dir: the folder of a run.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: there is no such folder.
        OSError: the report cannot be written.
    """
    run = load_run(run_dir)
    bars = _picture(
        "Trained encoder against baselines",
        "Classifiers on frozen features, judged on held-out images. "
        "A bar that ends left of a dashed line is worse than that baseline.",
        figures.probe_bars(run.summary),
    )
    page = Page(
        run=run,
        warning=_warning(run),
        verdict=verdict(run.summary),
        bars=bars,
        curves=_curves(run),
        patches=_patches(run),
    )
    report = run_dir / "report"
    report.mkdir(exist_ok=True)
    for picture in [*([bars] if bars else []), *page.curves, *page.patches]:
        name = re.sub(r"[^a-z0-9]+", "_", picture.title.lower()).strip("_")
        for number, png in enumerate(picture.pngs, start=1):
            suffix = "" if len(picture.pngs) == 1 else f"_{number}"
            _replace(report / f"{name}{suffix}.png", png)
    path = report / "index.html"
    _replace(path, render(page).encode())
    return path


def _curves(run: Run) -> list[Picture]:
    metrics, summary = run.metrics, run.summary
    pictures = [
        _picture(
            "Loss",
            "A low loss alone is no sign of learning: a collapsed target is the easiest to predict.",
            figures.loss_curve(metrics),
        ),
        _picture(
            "Linear probe over training",
            _ALONG_THE_WAY,
            figures.probe_curve(metrics, summary, "linear_top1"),
        ),
        _picture(
            "kNN over training",
            _ALONG_THE_WAY,
            figures.probe_curve(metrics, summary, "knn_top1"),
        ),
        _picture(
            "Effective rank",
            "RankMe: how many dimensions are in use. Losing half is a warning; height proves nothing.",
            figures.rank_curve(metrics),
        ),
        _picture(
            "Spread of the features",
            "Over all tokens, and between images: below its red line, they look alike to the target encoder.",
            figures.std_curve(metrics),
        ),
        _picture(
            "Speed",
            "Images per second over all devices, and the share of time spent waiting for data.",
            figures.speed_curve(metrics),
        ),
        _picture("Schedules", "As set by the optimizer step.", figures.schedule_curves(metrics)),
    ]
    return [picture for picture in pictures if picture is not None]


def _patches(run: Run) -> list[Picture]:
    if not run.snapshots:
        return []
    first, last = run.snapshots[0], run.snapshots[-1]
    if last.targets is None:
        what = "Everything outside is to be predicted."
    else:
        colours = [patches.BLOCK_COLOURS[i % len(patches.BLOCK_COLOURS)] for i in range(len(last.targets))]
        chips = " ".join(
            f'<span class="chip" style="color:{colour}">{i}</span>'
            for i, colour in enumerate(colours, start=1)
        )
        what = f"Outlined: the blocks to predict, {chips}"
    masks = Picture(
        "Masks as sampled",
        f"In full: the patches that the context encoder sees. Faded: hidden from it. {what}",
        [figures.to_png(figure) for figure in patches.mask_pictures(last)],
    )
    return [masks, _features(first, last)]


def _features(first: Snapshot, last: Snapshot) -> Picture:
    title = "Patch features as colours"
    snapshots = [first] if first.step == last.step else [first, last]
    try:
        drawn = patches.feature_pictures(snapshots)
    except ValueError as error:  # a diverged run, or snapshots of other images
        return Picture(title, f"Cannot be drawn: {escape(str(error))}.", [])
    caption = (
        "The first three principal components of the target encoder's patch features as red, green and "
        "blue: like colours, like features. Each row of colours has a basis of its own: compare patterns "
        "between rows, not hues."
    )
    return Picture(title, caption, [figures.to_png(figure) for figure in drawn])


def _warning(run: Run) -> str | None:
    """The last signs of collapse against the first ones logged."""
    signs = [
        CollapseSigns(**{key: row[key] for key in _SIGNS})
        for row in run.metrics
        if all(key in row for key in _SIGNS)
    ]
    return collapse_warning(signs[-1], start=signs[0]) if signs else None


def _picture(title: str, caption: str, figure: Figure | None) -> Picture | None:
    return None if figure is None else Picture(title, caption, [figures.to_png(figure)])


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.tmp")
    partial.write_bytes(content)
    os.replace(partial, path)

"""From a run folder to its page: which pictures there are, and the words beside them."""

import os
import re
import time
from dataclasses import fields
from pathlib import Path

from matplotlib.figure import Figure

from fastjepa.evaluation.collapse import CollapseSigns, collapse_warning
from fastjepa.evaluation.pictures import share_of_three
from fastjepa.report import figures, patches, shown, words
from fastjepa.report.events import events
from fastjepa.report.load import Run, Snapshot, load_run
from fastjepa.report.page import Page, Picture, render
from fastjepa.report.status import status_of
from fastjepa.report.times import times
from fastjepa.report.verdict import along_the_way, percent, so_far, trained_probe, verdict, watched_encoder

_JUDGED_ALIKE = (
    "Judged as often as this, probes learn from fewer images than at the end, and mostly score less. "
    "Dashed: the baselines, judged alike. The result is the one above."
)
_JUDGED_ON_MORE = (
    "Along the way probes learn from fewer images than at the end, and score less by some points for that "
    "alone. Dashed: the baselines, judged as at the end. So only a point of the end compares with them."
)
_SIGNS = tuple(field.name for field in fields(CollapseSigns))


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report/index.html`, and its pictures beside it as PNG files.

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
    return put(compose(run_dir), run_dir)


def compose(run_dir: Path) -> Page:
    """Draw what is to be seen of a run as it is now, and find the words for it.

    Reads `config.yaml`, `metrics.jsonl`, `report/summary.json` and `report/snapshots/*.safetensors`.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    run = load_run(run_dir)
    status = status_of(run_dir, run)
    sentences = verdict(run.summary)
    if status.state != "ended" and run.summary.steps and trained_probe(run.summary) is not None:
        ended = f"At step {run.summary.steps:,}, where the run had ended before it was taken up again: "
        sentences[0] = ended + sentences[0][0].lower() + sentences[0][1:]
    if status.state != "ended" and (news := so_far(run.metrics, run.summary)):
        sentences.append(news)
    return Page(
        run=run,
        status=status,
        written="" if status.state == "ended" else time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        warning=_warning(run),
        verdict=sentences,
        bars=_chart(
            "Trained encoder against baselines",
            "Classifiers on frozen features, judged on held-out images. "
            "A bar that ends left of a dashed line is worse than that baseline.",
            figures.probe_bars(run.summary),
            words.bars(run.summary),
        ),
        events=events(run.metrics),
        curves=_curves(run),
        times=times(run),
        patches=_patches(run),
    )


def put(page: Page, run_dir: Path, refresh_s: int | None = None) -> Path:
    """Write a page and its pictures; `refresh_s` as for `render`.

    Raises:
        OSError: it cannot be written.
    """
    report = run_dir / "report"
    report.mkdir(exist_ok=True)
    for picture in [*([page.bars] if page.bars else []), *page.curves, *page.patches]:
        name = re.sub(r"[^a-z0-9]+", "_", picture.title.lower()).strip("_")
        for number, png in enumerate(picture.pngs, start=1):
            suffix = "" if len(picture.pngs) == 1 else f"_{number}"
            _replace(report / f"{name}{suffix}.png", png)
    path = report / "index.html"
    _replace(path, render(page, refresh_s).encode())
    return path


def _curves(run: Run) -> list[Picture]:
    metrics, summary = run.metrics, run.summary
    judged, _ = along_the_way(metrics, summary)
    how = _JUDGED_ALIKE if summary.along else _JUDGED_ON_MORE
    is_mae, watched = summary.objective == "mae", watched_encoder(summary)
    pictures = [
        _chart(
            "Loss",
            "A low loss alone is no sign of good features: pixels can be painted well with little understood."
            if is_mae
            else "A low loss alone is no sign of learning: a collapsed target is the easiest to predict.",
            figures.loss_curve(metrics),
            words.chart(metrics, [("loss", "Loss", 1)]),
        ),
        _chart(
            "Linear probe over training",
            how,
            figures.probe_curve(metrics, summary, "linear_top1"),
            words.chart(judged, [("linear_top1", "Top-1 accuracy of the linear probe in %", 100)]),
        ),
        _chart(
            "kNN over training",
            how,
            figures.probe_curve(metrics, summary, "knn_top1"),
            words.chart(judged, [("knn_top1", "Top-1 accuracy of kNN in %", 100)]),
        ),
        _chart(
            "Effective rank",
            f"RankMe: dimensions that the {watched} uses. Losing half is a warning; height proves nothing.",
            figures.rank_curve(metrics),
            words.chart(metrics, [(key, f"RankMe of {name}", 1) for key, name, _ in figures.RANKS]),
        ),
        _chart(
            "Spread of the features",
            f"Over all tokens, and between images: below its red line, they look alike to the {watched}.",
            figures.std_curve(metrics),
            words.chart(metrics, [(key, f"Deviation of {name}", 1) for key, name, _ in figures.SPREADS]),
        ),
        _chart(
            "Speed",
            "Images per second over all devices, and the share of time spent waiting for data.",
            figures.speed_curve(metrics),
            words.chart(metrics, figures.SPEEDS),
        ),
        _chart(
            "Schedules",
            "As set by the optimizer step.",
            figures.schedule_curves(metrics),
            words.chart(metrics, figures.SCHEDULES),
        ),
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
            f'<span class="chip"><span class="swatch" style="color:{colour}"></span>{i}</span>'
            for i, colour in enumerate(colours, start=1)
        )
        what = (
            f"Outlined: the blocks to predict, {chips}"
            if len(colours) > 1
            else "Outlined: what is predicted."
        )
    masks = Picture(
        "Masks as sampled",
        f"In full: the patches that the context encoder sees. Faded: hidden from it. {what}",
        [figures.to_png(figure) for figure in patches.mask_pictures(last)],
        words.masks(last),
    )
    return [masks, _features(run.snapshots, watched_encoder(run.summary)), *shown.pictures(first, last)]


def _features(snapshots: list[Snapshot], encoder: str) -> Picture:
    title = "Patch features as colours"
    snapshots, reasons = patches.comparable(snapshots)
    left_out = f"Left out: {'; '.join(reasons)}." if reasons else ""
    if not snapshots:
        return Picture(title, left_out, [])
    colours = patches.feature_colours(snapshots)
    caption = (
        f"The first three principal components of the {encoder}'s patch features as red, green and blue: "
        "within a row, like colours are like features. Each is stretched over all of its colour, so vivid "
        "colours do not say that features differ much; the three hold "
    )
    when = [patches.when(snapshot) for snapshot in snapshots]
    ends = [(when[0], snapshots[0]), (when[-1], snapshots[-1])][-len(snapshots) :]
    held = [
        f"{percent(share_of_three(snapshot.features))} of the variance ({name})" for name, snapshot in ends
    ]
    caption += f"{' and '.join(held)}."
    if len(snapshots) > 1:
        agreed = [
            f"{name}: {patches.agreement(row, colours[-1]):.2f}"
            for name, row in zip(when, colours, strict=True)
        ]
        caption += (
            " Features of two times have no basis in common, so each row has three components of its own, "
            "turned to agree with the last row as well as they can. How well they do says whether a hue may "
            "be followed down the rows (mean correlation with the last row, 1 at most): "
            f"{', '.join(agreed[:-1])}."
        )
    if left_out:
        caption += f" {left_out}"
    drawn = patches.feature_pictures(snapshots, colours)
    return Picture(
        title, caption, [figures.to_png(figure) for figure in drawn], words.features(snapshots, when)
    )


def _warning(run: Run) -> str | None:
    """The last signs of collapse against the first ones logged."""
    signs = [
        CollapseSigns(**{key: row[key] for key in _SIGNS})
        for row in run.metrics
        if all(key in row for key in _SIGNS)
    ]
    return collapse_warning(signs[-1], start=signs[0]) if signs else None


def _chart(title: str, caption: str, figure: Figure | None, alt: str) -> Picture | None:
    return None if figure is None else Picture(title, caption, [figures.to_png(figure)], alt, is_chart=True)


def _replace(path: Path, content: bytes) -> None:
    # Of this process: a run that ends while it is watched writes too.
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

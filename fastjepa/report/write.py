"""From a run folder to its page: which pictures there are, and the words beside them."""

import os
import re
from dataclasses import fields
from html import escape
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from fastjepa.evaluation.collapse import CollapseSigns, collapse_warning
from fastjepa.report import attention, figures, neighbours, painting, patches, predictions
from fastjepa.report.load import Run, Snapshot, load_run
from fastjepa.report.page import Page, Picture, render
from fastjepa.report.verdict import percent, verdict

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
    return [masks, _features(first, last), *_showing(first, last)]


def _showing(first: Snapshot, last: Snapshot) -> list[Picture]:
    """What the last snapshot shows besides, or what it lacks."""
    pictures = [
        _predictions(first, last),
        _retrieved(last),
        _examples(last),
        _painted(first, last),
        _neighbours(last),
        _attended(last),
    ]
    found = [picture for picture in pictures if picture is not None]
    if found:
        return found
    lacks = (
        f"The snapshot of step {last.step:,} has none of it: an older version wrote it, or the features were "
        "not finite, or the run warned that it could not be computed."
    )
    return [Picture("Predictions, neighbours and attention", lacks, [])]


def _predictions(first: Snapshot, last: Snapshot) -> Picture | None:
    view, targets = last.showing.predictions, last.targets
    if view is None or targets is None:
        return None
    start = first.showing.predictions
    before = "" if start is None or first.step == last.step else f" ({_mean(start.centred)} at the start)"
    caption = (
        "How near the predictor comes to the target encoder's representation of each hidden patch, the mean "
        "target of that place over other images taken off both. 1 is exact; 0 is no better than that mean, "
        "which needs no look at the image. Under each block its mean; the scale begins where "
        "the values do. Over all blocks it is "
        f"{_mean(view.centred)}{before}, and {_mean(view.of_others)} against the targets of the other images "
        f"shown. Without the mean taken off, the cosine is {_mean(view.cosine)}, of which the mean alone "
        f"reaches {_mean(view.of_mean)}: a high cosine by itself proves nothing. Nor does a good prediction "
        "prove a good target: one that says little is easy to predict."
    )
    return _drawn(
        "What the predictor predicts", caption, predictions.prediction_pictures(last, view, targets)
    )


def _retrieved(last: Snapshot) -> Picture | None:
    view, targets = last.showing.retrieved, last.targets
    if view is None or targets is None:
        return None
    caption = (
        "Each patch that is to be predicted, filled with a patch of training images: the one whose target "
        "representation is nearest to what the predictor says; to the true target, which is the best that "
        "this can look; and to the mean target of the place, which knows nothing of the "
        "image. Where the first "
        "looks like the second and unlike the third, the predictor has understood something. The patches "
        "outside the outlines are the image's own. No decoder is at work, and what the representation leaves "
        "out, such as brightness, may be wrong without being a fault."
    )
    return _drawn(
        "Predictions as patches of other images", caption, predictions.retrieval_pictures(last, view, targets)
    )


def _examples(last: Snapshot) -> Picture | None:
    view = last.showing.retrieved
    if view is None:
        return None
    caption = (
        "One hidden patch of each block of two images, framed, amid its surroundings, and the "
        "training patches "
        "nearest to what was predicted for it and to its true target. Grey lies outside the "
        "image. The patches "
        "are the middle ones of their blocks, and were not chosen for their looks."
    )
    return _drawn("The nearest patches, one by one", caption, [predictions.example_picture(view)])


def _painted(first: Snapshot, last: Snapshot) -> Picture | None:
    view, targets = last.showing.painted, last.targets
    if view is None or targets is None:
        return None
    given = (
        "It was trained on patches that are normalised one by one, so each hidden patch is "
        "given its true mean "
        "and contrast back: judge the pattern within patches, beside what the mean alone shows"
        if view.is_normalised
        else "Beside it: the mean colour of what is seen"
    )
    start = first.showing.painted
    before = "" if start is None or first.step == last.step else f" ({_mean(start.correlation)} at the start)"
    caption = (
        f"What the decoder paints where the encoder does not see. {given}. Agreement: the correlation of the "
        f"pixels painted and the true ones in each patch, {_mean(view.correlation)} on the average{before}; "
        f"the mean patch of the place over other images reaches {_mean(view.of_mean)}. Patches "
        "of one grey are "
        "left out. Sharp pixels are not what makes features good, nor blurred ones what makes them bad."
    )
    return _drawn("What the decoder paints", caption, painting.painting_pictures(last, view, targets[0]))


def _neighbours(last: Snapshot) -> Picture | None:
    view = last.showing.neighbours
    if view is None:
        return None
    caption = (
        f"The nearest of {len(view.bank_labels):,} training images by mean-pooled features, "
        "and below them by "
        "raw pixels. Where both find the same, the features have added nothing."
    )
    if neighbours.has_labels(view):
        features, pixels, chance = map(percent, neighbours.same_label(view))
        caption += (
            f" Blue: the same label. Of these few, {features} by features and {pixels} by pixels have it, "
            f"{chance} by chance; the probes above count many more."
        )
    return _drawn("Nearest images", caption, neighbours.neighbour_pictures(last, view))


def _attended(last: Snapshot) -> Picture | None:
    view = last.showing.attended
    if view is None:
        return None
    token = (
        "from the class token, which no loss reaches directly"
        if view.from_class.shape[1]
        else "there is no class token whose attention would stand for the image"
    )
    caption = (
        "Attention in the last block: from the framed patch, the middle one whatever is there; as each patch "
        f"receives it from all patches on the average; {token}. The mean over the heads, and at last a few "
        "heads apart. It shows from where information is taken, not what the features hold: earlier blocks "
        "have mixed the patches before."
    )
    return _drawn("Where the encoder looks", caption, attention.attention_pictures(last, view))


def _mean(values: Tensor) -> str:
    """To two digits; places without a value are left out."""
    return f"{float(values.float().nanmean()):.2f}".replace("-", "\N{MINUS SIGN}")


def _drawn(title: str, caption: str, drawn: list[Figure]) -> Picture:
    return Picture(title, caption, [figures.to_png(figure) for figure in drawn])


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

"""What the last snapshot of a run shows besides masks and features, and the words beside it."""

import math

from matplotlib.figure import Figure
from torch import Tensor

from fastjepa.report import attention, figures, neighbours, painting, predictions
from fastjepa.report.load import Snapshot
from fastjepa.report.page import Picture
from fastjepa.report.verdict import percent


def pictures(first: Snapshot, last: Snapshot) -> list[Picture]:
    """What the last snapshot shows besides, or what it lacks."""
    drawn = [
        _predictions(first, last),
        _retrieved(last),
        _examples(last),
        _painted(first, last),
        _neighbours(last),
        _attended(last),
    ]
    found = [picture for picture in drawn if picture is not None]
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
        "95 % of the values do. Over all blocks it is "
        f"{_mean(view.centred)}{before}, and {_mean(view.of_others)} against the targets of the other images "
        f"shown. Without the mean taken off, the cosine is {_mean(view.cosine)}, of which the mean alone "
        f"reaches {_mean(view.of_mean)}: a high cosine by itself proves nothing. Nor does a good prediction "
        "prove a good target: one that says little is easy to predict."
    )
    blocks = ", ".join(_mean(block) for block in view.centred)
    alt = (
        f"{len(last.images)} images with the cosine of prediction and target over each hidden patch, as "
        f"colours. Mean of each block over the images, in turn: {blocks}."
    )
    drawn = predictions.prediction_pictures(last, view, targets)
    return _drawn("What the predictor predicts", caption, drawn, alt)


def _retrieved(last: Snapshot) -> Picture | None:
    view, targets = last.showing.retrieved, last.targets
    if view is None or targets is None:
        return None
    caption = (
        "Each patch that is to be predicted, filled with a patch of training images: the one whose target "
        "representation is nearest to what the predictor says; to the true target, which is the best that "
        "this can look; and to the mean target of the place, which knows nothing of the image. Where the "
        "first looks like the second and unlike the third, the predictor has understood something. The "
        "patches outside the outlines are the image's own. No decoder is at work, and what the "
        "representation leaves out, such as brightness, may be wrong without being a fault."
    )
    alt = (
        f"{len(last.images)} images, and each three times with its {len(targets)} hidden blocks filled with "
        "patches of other images: by prediction, by the true target, by the mean target."
    )
    drawn = predictions.retrieval_pictures(last, view, targets)
    return _drawn("Predictions as patches of other images", caption, drawn, alt)


def _examples(last: Snapshot) -> Picture | None:
    view = last.showing.retrieved
    if view is None:
        return None
    caption = (
        "One hidden patch of each block of two images, framed, amid its surroundings, and the training "
        "patches nearest to what was predicted for it and to its true target. Grey lies outside the image. "
        "The patches are the middle ones of their blocks, and were not chosen for their looks."
    )
    near = (view.examples.shape[1] - 1) // 2
    alt = (
        f"{len(view.examples)} hidden patches, and beside each the {near} patches nearest to its prediction "
        f"and the {near} nearest to its true target."
    )
    return _drawn("The nearest patches, one by one", caption, [predictions.example_picture(view)], alt)


def _painted(first: Snapshot, last: Snapshot) -> Picture | None:
    view, targets = last.showing.painted, last.targets
    if view is None or targets is None:
        return None
    given = (
        "It was trained on patches that are normalised one by one, so each hidden patch is given its true "
        "mean and contrast back: judge the pattern within patches, beside what the mean alone shows"
        if view.is_normalised
        else "Beside it: the mean colour of what is seen"
    )
    start = first.showing.painted
    before = "" if start is None or first.step == last.step else f" ({_mean(start.correlation)} at the start)"
    caption = (
        f"What the decoder paints where the encoder does not see. {given}. Match: the correlation of the "
        f"pixels painted and the true ones in each patch, {_mean(view.correlation)} on the average{before}; "
        f"the mean patch of the place over other images reaches {_mean(view.of_mean)}. Patches of one grey "
        "are left out. Sharp pixels are not what makes features good, nor blurred ones what makes them bad."
    )
    alt = (
        f"{len(last.images)} images, and each with its {targets.shape[2]} hidden patches as the decoder "
        "paints them and as what it was given shows them. Mean correlation with the true pixels: "
        f"{_mean(view.correlation)}."
    )
    drawn = painting.painting_pictures(last, view, targets[0])
    return _drawn("What the decoder paints", caption, drawn, alt)


def _neighbours(last: Snapshot) -> Picture | None:
    view = last.showing.neighbours
    if view is None:
        return None
    caption = (
        f"The nearest of {len(view.bank_labels):,} training images by mean-pooled features, and below them "
        "by raw pixels. Where both find the same, the features have added nothing."
    )
    if neighbours.has_labels(view):
        features, pixels, chance = map(percent, neighbours.same_label(view))
        caption += (
            f" Blue: the same label. Of these few, {features} by features and {pixels} by pixels have it, "
            f"{chance} by chance; the probes above count many more."
        )
    alt = (
        f"{len(last.images)} images, and for each the {view.by_features.shape[1]} nearest of "
        f"{len(view.bank_labels):,} others by features, and by raw pixels."
    )
    return _drawn("Nearest images", caption, neighbours.neighbour_pictures(last, view), alt)


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
    alt = (
        f"{len(last.images)} images, and maps of the attention of the last block over each: from one patch, "
        f"received on the average, and of some of its {view.from_patch.shape[1]} heads."
    )
    return _drawn("Where the encoder looks", caption, attention.attention_pictures(last, view), alt)


def _mean(values: Tensor) -> str:
    """To two digits; places without a value are left out."""
    mean = float(values.float().nanmean())
    return f"{mean:.2f}".replace("-", "\N{MINUS SIGN}") if math.isfinite(mean) else "no number"


def _drawn(title: str, caption: str, drawn: list[Figure], alt: str) -> Picture:
    return Picture(title, caption, [figures.to_png(figure) for figure in drawn], alt)

"""What the probes say in words: generated from the numbers, so that no win is claimed that is not there."""

from fastjepa.evaluation.intervals import two_proportions
from fastjepa.report.load import Metrics, Probe, Summary

TRAINED = ("trained target encoder", "trained context encoder", "trained encoder")  # the last of MAE
BASELINES = ("raw pixels", "untrained encoder", "initial weights")  # the last where a run was given some
_USUAL_IMAGES = 10_000  # that they were judged on, where an older version did not note it

_MEASURES = {"linear_top1": "linear probe", "knn_top1": "kNN"}
_IN_WORDS = {
    "raw pixels": "raw pixels",
    "untrained encoder": "an untrained encoder",
    "initial weights": "the weights it began with",
}


def percent(fraction: float) -> str:
    """To a tenth, with the sign kept on the line of the number."""
    return f"{100 * fraction:.1f}\N{NO-BREAK SPACE}%"


def trained_probe(summary: Summary) -> Probe | None:
    """The row the report is about: the target encoder's, as in the paper, else the context encoder's."""
    return next((probe for name in TRAINED if (probe := summary.probe(name)) is not None), None)


def watched_encoder(summary: Summary) -> str:
    """Whose features curves and pictures are of."""
    return "encoder" if summary.objective == "mae" else "target encoder"


def verdict(summary: Summary) -> list[str]:
    """A first sentence with the outcome against each baseline, then one per measure with the numbers."""
    trained = trained_probe(summary)
    if trained is None:
        return ["The trained encoder has not been probed."]
    outcomes = [words for name in BASELINES if (words := _outcome(trained, summary, name))]
    if not outcomes:
        return [f"The {trained.name} has no baseline to be compared with."]
    numbers = [
        f"By {measure} {percent(value)}: {_gaps(value, summary, key)}."
        for key, measure in _MEASURES.items()
        if (value := getattr(trained, key)) is not None
    ]
    return [f"The {trained.name} {', and '.join(outcomes)}.", *numbers]


def along_the_way(metrics: Metrics, summary: Summary) -> tuple[Metrics, Metrics]:
    """The judged rows of along the way, and that of the end, which learns from more images and scores more.

    The latter is known by the accuracies in the summary. Where as many images were taken along the way, there
    is no difference, and no such row.
    """
    judged = [row for row in metrics if any(key in row for key in _MEASURES)]
    trained = trained_probe(summary)
    if trained is None or (summary.along and set(summary.along) <= set(summary.probes)):
        return judged, []
    is_end = [all(row.get(key) == getattr(trained, key) for key in _MEASURES) for row in judged]
    return (
        [row for row, end in zip(judged, is_end, strict=True) if not end],
        [row for row, end in zip(judged, is_end, strict=True) if end],
    )


def so_far(metrics: Metrics, summary: Summary) -> str | None:
    """The newest judgement of a run that has not ended; None if there is none, or it is the verdict's own."""
    judged, ends = along_the_way(metrics, summary)
    if not judged or (ends and ends[-1]["step"] > judged[-1]["step"]):
        return None
    row = judged[-1]
    numbers = [
        f"{measure} {percent(row[key])}{_judged_alike(summary, key)}"
        for key, measure in _MEASURES.items()
        if key in row
    ]
    return f"So far, at step {row['step']:,.0f} and judged on fewer images: {', '.join(numbers)}."


def _judged_alike(summary: Summary, key: str) -> str:
    """The baselines on as few images, in brackets."""
    values = [(name, getattr(summary.baseline_along(name), key, None)) for name in BASELINES]
    said = [f"{_IN_WORDS[name]} {percent(value)}" for name, value in values if value is not None]
    return f" ({', '.join(said)})" if said else ""


def differ(one: float, other: float, summary: Summary) -> bool:
    """Whether two accuracies on the images judged differ by more than luck, at 95 %.

    Tested as if the images were not the same, which asks for a little more than if each were compared.
    """
    count = summary.judged_images or _USUAL_IMAGES
    return two_proportions((round(one * count), round(other * count)), (count, count)).differs


def _outcome(trained: Probe, summary: Summary, name: str) -> str | None:
    """By which measures the baseline is beaten, and by which not; None if there is none of both."""
    baseline = summary.probe(name)
    won: list[str] = []
    lost: list[str] = []
    for key, measure in _MEASURES.items():
        value, other = getattr(trained, key), getattr(baseline, key, None)
        if value is not None and other is not None:
            (won if value > other and differ(value, other, summary) else lost).append(measure)
    if not won and not lost:
        return None
    if not won:
        return f"does not beat {_IN_WORDS[name]} by {' or '.join(lost)}"
    but = f" but not by {lost[0]}" if lost else ""
    return f"beats {_IN_WORDS[name]} by {' and '.join(won)}{but}"


def _gaps(value: float, summary: Summary, key: str) -> str:
    gaps = []
    for name in BASELINES:
        other = getattr(summary.probe(name), key, None)
        if other is None and name == "initial weights":
            continue
        if other is None:
            gaps.append(f"{_IN_WORDS[name]} not measured")
            continue
        points = 100 * (value - other)
        side = "above" if points > 0 else "below"
        gap = f"{abs(points):.1f} points {side}" if differ(value, other, summary) else "level with"
        gaps.append(f"{gap} {_IN_WORDS[name]} ({percent(other)})")
    return ", ".join(gaps)

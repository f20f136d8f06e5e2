"""What the pictures show, in words and numbers, for those who do not see them."""

from fastjepa.report.figures import series
from fastjepa.report.load import Metrics, Snapshot, Summary
from fastjepa.report.verdict import percent


def chart(metrics: Metrics, lines: list[tuple[str, str, float]]) -> str:
    """The course of each line (key, name, factor) that was logged."""
    courses = []
    for key, name, factor in lines:
        _, y = series(metrics, key)
        if len(y):
            y = factor * y
            between = f", lowest {y.min():.3g}, highest {y.max():.3g}" if len(y) > 1 else ""
            courses.append(f"{name}: first {y[0]:.3g}, last {y[-1]:.3g}{between}")
    return f"Line chart over the images seen. {'; '.join(courses)}."


def bars(summary: Summary) -> str:
    """All accuracies."""
    said = []
    for probe in summary.probes:
        measured = [("linear probe", probe.linear_top1), ("kNN", probe.knn_top1)]
        values = " and ".join(f"{name} {percent(value)}" for name, value in measured if value is not None)
        said.append(f"{probe.name}: {values or 'not measured'}")
    return f"Bar chart of top-1 accuracies. {'; '.join(said)}."


def masks(snapshot: Snapshot) -> str:
    """How much of the images is seen and predicted."""
    down, across = snapshot.grid
    seen = sum(map(len, snapshot.context)) / len(snapshot.context)
    text = (
        f"{len(snapshot.images)} images, each cut into {down} by {across} patches, of which the context "
        f"encoder sees {seen:.0f}"
    )
    if snapshot.targets is None:
        return f"{text}; the others are veiled."
    blocks, _, patches = snapshot.targets.shape
    what = "blocks" if blocks > 1 else "block"
    return (
        f"{text}; the others are veiled, and outlines show {blocks} {what} of {patches} patches to predict."
    )


def features(snapshots: list[Snapshot], when: list[str]) -> str:
    """Which rows there are."""
    return (
        f"{len(snapshots[0].images)} images in a row, and under each the features of its patches as colours: "
        f"{', '.join(when)}."
    )

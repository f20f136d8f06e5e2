"""Stored results side by side: how far apart, and whether that is more than chance.

On the same images, one by one, McNemar's test asks only where the two disagree; on different images there
is nothing to pair, and the two fractions are compared. Draws of labels are paired by draw.
"""

from dataclasses import dataclass

from fastjepa.evaluation.intervals import Difference, apart, mcnemar, paired_splits, two_proportions
from fastjepa.probe.results import Result, Row
from fastjepa.probe.subjects import ProbeError

# Of the settings, what makes the draws of labels another.
_OF_DRAWS = ("seed", "splits", "fractions")


@dataclass(frozen=True)
class Compared:
    """One number of two results."""

    first: Row
    second: Row
    difference: Difference


def compare(first: Result, second: Result) -> list[Compared]:
    """Every number that both have, of their encoders.

    Raises:
        ProbeError: they have none in common, or other classes.
    """
    if first.data["classes"] != second.data["classes"]:
        raise ProbeError(
            f"their images have other classes ({len(first.data['classes'])} and "
            f"{len(second.data['classes'])}): accuracies of different tasks cannot "
            "be compared; probe both with the same --data"
        )
    ours, theirs = first.of_subject(), second.of_subject()
    common = [key for key in ours if key in theirs]
    if not common:
        raise ProbeError("they have no protocol in common: probe both with the same --protocol")
    same_images = first.data["fingerprint"] == second.data["fingerprint"]
    same_draws = same_images and all(first.settings[key] == second.settings[key] for key in _OF_DRAWS)
    return [
        Compared(ours[key], theirs[key], difference_of(ours[key], theirs[key], same_images, same_draws))
        for key in common
    ]


def difference_of(first: Row, second: Row, same_images: bool, same_draws: bool) -> Difference:
    """The second less the first, by the test that fits."""
    if first.splits == second.splits == 1:
        a, b = first.right()[0], second.right()[0]  # [m] each
        if same_images and len(a) == len(b):
            return mcnemar(a, b)
        return two_proportions((int(a.sum()), int(b.sum())), (len(a), len(b)))
    if same_draws and (first.splits, first.images) == (second.splits, second.images):
        return paired_splits(first.right(), second.right())
    return apart((first.accuracy, first.interval), (second.accuracy, second.interval))


def notes(first: Result, second: Result) -> list[str]:
    """What else differs between the two, and which tests were made, for the reader."""
    lines = []
    if first.data["fingerprint"] != second.data["fingerprint"]:
        lines.append(
            "different images: two fractions are compared, which sees only larger differences; probe both "
            "with the same --data to pair them"
        )
    changed = [key for key in first.settings if first.settings[key] != second.settings.get(key)]
    changed = [key for key in changed if key not in ("baselines", "protocols")]
    if changed:
        lines.append(f"other settings: {', '.join(changed)}")
    tests = dict.fromkeys(one.difference.test for one in compare(first, second))
    lines.append(f"tests: {'; '.join(tests)}")
    return lines

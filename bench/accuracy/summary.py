"""From results to numbers, bands and sentences. Nothing in the sentences but what the numbers say."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from bench.accuracy.plan import CLEAN, LEARNERS, TRAINED, Condition
from bench.accuracy.store import Point, Result

Measure = Literal["linear_top1", "knn_top1"]
Cost = Literal["seconds", "flop"]
Winner = Literal["jepa", "mae", "neither"]
MEASURES: dict[Measure, str] = {"linear_top1": "linear probe", "knn_top1": "kNN"}
NAMES = {"pixels": "raw pixels", "untrained": "an untrained encoder", "jepa": "I-JEPA", "mae": "MAE"}
LOOP = (
    "Trained by this benchmark's own loop, in fp32 (matrices in TF32 on a GPU), there each step a CUDA graph "
    "of its own: the engine's models and masks, but not the step that `fit` runs, so its seconds are not "
    "those of the engine."
)
_PLURAL = ("pixels",)


@dataclass(frozen=True)
class Band:
    """Mean, least and most over seeds."""

    mean: float
    low: float
    high: float
    seeds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Band | None":
        """None of no value."""
        values = list(values)
        if not values:
            return None
        low, high = min(values), max(values)
        # A mean of equal numbers may be rounded out of their range.
        return cls(min(max(math.fsum(values) / len(values), low), high), low, high, len(values))

    def overlaps(self, other: "Band") -> bool:
        return self.low <= other.high and other.low <= self.high

    def __str__(self) -> str:
        """In points: 81.2 (80.9–81.5)."""
        mean, low, high = (f"{100 * value:.1f}" for value in (self.mean, self.low, self.high))
        return mean if self.seeds == 1 else f"{mean} ({low}–{high})"


@dataclass(frozen=True)
class CurvePoint:
    """The runs of a learner after the same part of their training."""

    seconds: float
    flop: float
    accuracy: Band


def chosen(results: Sequence[Result], learner: str, condition: Condition) -> list[Result]:
    return [one for one in results if one.learner == learner and one.condition == condition]


def final(results: Sequence[Result], learner: str, condition: Condition, measure: Measure) -> Band | None:
    """What the learner has come to at its end."""
    return Band.of(_finals(results, learner, condition, measure).values())


def _finals(
    results: Sequence[Result], learner: str, condition: Condition, measure: Measure
) -> dict[int, float]:
    """By seed, without those that diverged."""
    values = {one.seed: getattr(one.points[-1], measure) for one in chosen(results, learner, condition)}
    return {seed: value for seed, value in values.items() if value is not None}


def curve(results: Sequence[Result], learner: str, measure: Measure) -> list[CurvePoint]:
    """Accuracy on clean images while training, where all seeds were judged after the same step."""
    runs = chosen(results, learner, Condition())
    by_step: dict[int, list[Point]] = {}
    for run in runs:
        for point in run.points:
            if getattr(point, measure) is not None:
                by_step.setdefault(point.step, []).append(point)
    found = []
    for _, points in sorted(by_step.items()):
        band = Band.of(getattr(point, measure) for point in points)
        if band is not None and len(points) == len(runs):
            found.append(CurvePoint(points[0].seconds, points[0].flop, band))
    return found


def loss(results: Sequence[Result], learner: str, condition: Condition, measure: Measure) -> Band | None:
    """How much lower the same seed ends under a condition than on clean images."""
    clean = _finals(results, learner, Condition(), measure)
    now = _finals(results, learner, condition, measure)
    return Band.of(clean[seed] - now[seed] for seed in sorted(clean.keys() & now.keys()))


def corrupted(results: Sequence[Result]) -> dict[str, list[float]]:
    """The strengths of each kind, ascending."""
    found: dict[str, set[float]] = {}
    for one in results:
        if one.kind != CLEAN:
            found.setdefault(one.kind, set()).add(one.strength)
    return {kind: sorted(strengths) for kind, strengths in sorted(found.items())}


def at_cost(points: Sequence[CurvePoint], cost: Cost, value: float) -> Band | None:
    """A curve between its points, by the logarithm of the cost; None outside of it."""
    for before, after in itertools.pairwise(points):
        low, high = getattr(before, cost), getattr(after, cost)
        if 0 < low <= value <= high:
            part = math.log(value / low) / math.log(high / low) if high > low else 1.0
            a, b = before.accuracy, after.accuracy
            mean, least, most = (
                x + part * (y - x) for x, y in ((a.mean, b.mean), (a.low, b.low), (a.high, b.high))
            )
            return Band(mean, least, most, min(a.seeds, b.seeds))
    return None


def seconds_to(points: Sequence[CurvePoint], accuracy: float) -> float | None:
    """When the mean over seeds comes to an accuracy below which it does not fall again; None if never.

    The first judgement is the earliest time that can be told.
    """
    below = [i for i, point in enumerate(points) if point.accuracy.mean < accuracy]
    after = below[-1] + 1 if below else 0
    if after >= len(points):
        return None
    if after == 0:
        return points[0].seconds
    first, last = points[after - 1], points[after]
    part = (accuracy - first.accuracy.mean) / (last.accuracy.mean - first.accuracy.mean)
    return first.seconds * (last.seconds / first.seconds) ** part


# ------------------------------------------------------------------------------------------- sentences


def compare(bands: dict[str, Band], first: str, second: str) -> str:
    """Who is ahead, and whether by more than seeds do: "I-JEPA is ahead of MAE, 81.2 (…) to 80.1 (…) %"."""
    a, b = bands[first], bands[second]
    if b.mean > a.mean:
        return compare(bands, second, first)
    numbers, verb = f"{a} to {b} %", "are" if first in _PLURAL else "is"
    if min(a.seeds, b.seeds) == 1:
        lead = "level with" if a.mean == b.mean else "ahead of"
        return f"{NAMES[first]} {verb} {lead} {NAMES[second]}, {numbers}, with one seed"
    if a.overlaps(b):
        return f"{NAMES[first]} and {NAMES[second]} cannot be told apart, {numbers}: the bands overlap"
    return f"{NAMES[first]} {verb} ahead of {NAMES[second]}, {numbers}; the bands do not overlap"


def verdict(results: Sequence[Result], measure: Measure = "linear_top1") -> list[str]:
    """What the results show, in sentences."""
    said = _on_clean_images(results, measure)
    less: dict[Condition, Winner] = {}
    left: dict[Condition, Winner] = {}
    for kind, strengths in corrupted(results).items():
        for strength in reversed(strengths):
            condition = Condition(kind, strength)
            losses = _bands(loss, results, condition, measure)
            ends = _bands(final, results, condition, measure)
            if not set(TRAINED) <= losses.keys() & ends.keys():
                continue
            if kind not in {known.kind for known in less}:  # at its strongest
                said.append(_under(condition, losses, ends))
            less[condition] = smaller(losses["jepa"], losses["mae"])
            left[condition] = _OTHER[smaller(ends["jepa"], ends["mae"])]
    if less:
        said += [_conclusion(less), f"Of accuracy itself, {_shares(left, 'has more left')}."]
    return said or ["Nothing has been measured that could be compared."]


def _bands(
    of: Callable[..., Band | None], results: Sequence[Result], condition: Condition, measure: Measure
) -> dict[str, Band]:
    found = {learner: of(results, learner, condition, measure) for learner in LEARNERS}
    return {learner: band for learner, band in found.items() if band is not None}


def _on_clean_images(results: Sequence[Result], measure: Measure) -> list[str]:
    curves = {learner: curve(results, learner, measure) for learner in TRAINED}
    if not all(curves.values()):
        return []
    said = []
    costs: tuple[tuple[Cost, str], ...] = (("seconds", "{:.3g} s of training"), ("flop", "{:.2g} FLOPs"))
    for cost, words in costs:
        value = min(getattr(points[-1], cost) for points in curves.values())
        level = {name: band for name, points in curves.items() if (band := at_cost(points, cost, value))}
        if len(level) == 2:
            said.append(
                f"Clean images, {MEASURES[measure]}, {words.format(value)} each: {compare(level, *TRAINED)}."
            )
    bands = {learner: points[-1].accuracy for learner, points in curves.items()}
    wanted = min(band.mean for band in bands.values())
    times = {name: seconds_to(points, wanted) for name, points in curves.items()}
    needed = " and ".join(f"{NAMES[name]} {time:.2g} s" for name, time in times.items() if time is not None)
    said.append(f"To {100 * wanted:.1f} %, where both stay, it took {needed}.")
    best = max(bands, key=lambda name: bands[name].mean)
    for baseline in ("pixels", "untrained"):
        band = final(results, baseline, Condition(), measure)
        if band is not None:
            said.append(
                f"Of these two the better against {NAMES[baseline]}: "
                f"{compare({best: bands[best], baseline: band}, best, baseline)}."
            )
    return said


def smaller(jepa: Band, mae: Band) -> Winner:
    """Whose is smaller by more than seeds do. One seed does not say what seeds do."""
    if min(jepa.seeds, mae.seeds) < 2 or jepa.overlaps(mae):
        return "neither"
    return "jepa" if jepa.mean < mae.mean else "mae"


_OTHER: dict[Winner, Winner] = {"jepa": "mae", "mae": "jepa", "neither": "neither"}


def _under(condition: Condition, losses: dict[str, Band], ends: dict[str, Band]) -> str:
    each = ", ".join(f"{NAMES[name]} {losses[name]}" for name in sorted(losses, key=lambda n: losses[n].mean))
    return (
        f"With {condition.kind} of strength {condition.strength:g}, points lost, least first: {each}. "
        f"What is left: {compare(ends, *TRAINED)}."
    )


def _conclusion(less: dict[Condition, Winner]) -> str:
    winners = set(less.values())
    if winners == {"jepa"}:
        answer = "Predicting representations held better than predicting pixels under all of this detail"
    elif "jepa" in winners and "mae" not in winners:
        answer = "Predicting representations held better than predicting pixels under some of this detail"
    elif "jepa" in winners:
        answer = "Whether predicting representations or pixels held better depends on the detail"
    else:
        answer = "That predicting representations holds better than predicting pixels is not borne out here"
    return f"{answer}: {_shares(less, 'loses less')}."


def _shares(winners: dict[Condition, Winner], verb: str) -> str:
    def under(winner: Winner) -> str:
        return ", ".join(str(condition) for condition, name in winners.items() if name == winner)

    parts = [f"{NAMES[name]} {verb} under {under(name)}" for name in ("jepa", "mae") if under(name)]
    if under("neither"):
        parts.append(f"under {under('neither')} the bands overlap, or are of one seed")
    return "; ".join(parts)


# ---------------------------------------------------------------------------------------------- tables


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One for each learner and condition, as in accuracy.json."""
    found = []
    for condition in dict.fromkeys(sorted((one.condition for one in results), key=_order)):
        for learner in LEARNERS:
            if not chosen(results, learner, condition):
                continue
            row: dict[str, Any] = {"kind": condition.kind, "strength": condition.strength, "learner": learner}
            for measure in MEASURES:
                band = final(results, learner, condition, measure)
                row[measure] = None if band is None else asdict(band)
                lost = loss(results, learner, condition, measure) if condition.strength else None
                row[f"{measure}_lost"] = None if lost is None else asdict(lost)
            found.append(row)
    return found


def _order(condition: Condition) -> tuple[bool, str, float]:
    return condition.kind != CLEAN, condition.kind, condition.strength


def markdown(results: Sequence[Result]) -> str:
    lines = [
        "| images | strength | features | linear, % | kNN, % | linear lost | kNN lost | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows(results):
        bands = [
            Band(**row[key]) if row[key] else None
            for key in ("linear_top1", "knn_top1", "linear_top1_lost", "knn_top1_lost")
        ]
        cells = [str(band) if band else "–" for band in bands]
        strength = f"{row['strength']:g}" if row["strength"] else "–"
        seeds = max((band.seeds for band in bands if band), default=0)
        cells = [row["kind"], strength, NAMES[row["learner"]].removeprefix("an "), *cells, str(seeds)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)

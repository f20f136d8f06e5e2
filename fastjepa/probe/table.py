"""Results for people: accuracies with their intervals, measures without labels, and differences."""

from collections.abc import Sequence

from rich.table import Table

from fastjepa.probe.compare import Compared
from fastjepa.probe.results import Result, Row

MEASURES = {
    "std": ("std", 2),
    "dead_dimensions": ("dead", 2),
    "rankme": ("RankMe", 0),
    "lidar": ("LiDAR", 0),
    "alpha_req": ("alpha-ReQ", 2),
    "uniformity": ("uniformity", 2),
}


def _empty(first: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    return table


def accuracies(results: Sequence[Result]) -> Table:
    """A row for each subject, a column for each number: percent, and half of its 95 % interval."""
    table = _empty("features")
    rows = [row for result in results for row in result.rows]
    keys = list(dict.fromkeys(row.key for row in rows))
    for protocol, variant in keys:
        table.add_column(f"{protocol}\n{variant}", justify="right", no_wrap=True)
    by_subject: dict[str, dict[tuple[str, str], Row]] = {}
    for row in rows:
        by_subject.setdefault(row.subject, {})[row.key] = row
    for subject in _encoders_first(results, list(by_subject)):
        found = by_subject[subject]
        table.add_row(subject, *(cell(found[key]) if key in found else "" for key in keys))
    return table


def collapse(results: Sequence[Result]) -> Table:
    """A row for each subject, a column for each measure."""
    table = _empty("features")
    measured = {name: values for result in results for name, values in result.collapse.items()}
    shown = [key for key in MEASURES if any(key in values for values in measured.values())]
    for key in shown:
        table.add_column(MEASURES[key][0], justify="right", no_wrap=True)
    for subject in _encoders_first(results, list(measured)):
        values = measured[subject]
        numbers = (values.get(key) for key in shown)
        digits = (MEASURES[key][1] for key in shown)
        table.add_row(
            subject, *("" if v is None else f"{v:.{d}f}" for v, d in zip(numbers, digits, strict=True))
        )
    return table


def differences(names: Sequence[str], compared: Sequence[Sequence[Compared]]) -> Table:
    """The first result's numbers, and beside them every other's and how far it is from the first.

    Args:
        names: of the results.
        compared: for each result after the first, its numbers against the first's.
    """
    table = _empty("protocol")
    table.add_column(names[0], justify="right")
    for name in names[1:]:
        table.add_column(name, justify="right")
        table.add_column("difference", justify="right")
        table.add_column("p", justify="right")
        table.add_column("")
    lines: dict[tuple[str, str], list[str]] = {}
    for column, several in enumerate(compared):
        for one in several:
            line = lines.setdefault(one.first.key, [cell(one.first)])
            line += [""] * (1 + 4 * column - len(line))
            change = one.difference
            half = 100 * (change.interval.high - change.interval.low) / 2
            line += [
                cell(one.second),
                f"{100 * change.value:+.1f} ±{half:.1f}",
                "" if change.p is None else f"{change.p:.2g}",
                "differs" if change.differs else "within chance",
            ]
    for (protocol, variant), line in lines.items():
        table.add_row(f"{protocol} {variant}", *line)
    return table


def cell(row: Row) -> str:
    """84.3 ±0.7, in percent; the ± is the wider side of the interval."""
    half = max(row.accuracy - row.interval.low, row.interval.high - row.accuracy)
    return f"{100 * row.accuracy:.1f} ±{100 * half:.1f}"


def _encoders_first(results: Sequence[Result], names: list[str]) -> list[str]:
    encoders = [result.subject for result in results if result.subject in names]
    return [*encoders, *(name for name in names if name not in encoders)]

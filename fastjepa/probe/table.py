"""Results for people: accuracies with their intervals, measures without labels, and differences."""

from collections.abc import Sequence

from rich.table import Table

from fastjepa.probe.compare import Compared
from fastjepa.probe.results import Result, Row

MEASURES = {
    "std": ("std", 2),
    "dead_dimensions": ("dead dimensions", 2),
    "rankme": ("RankMe", 0),
    "lidar": ("LiDAR", 0),
    "alpha_req": ("alpha-ReQ", 2),
    "uniformity": ("uniformity", 2),
}


def accuracies(results: Sequence[Result]) -> Table:
    """A row for each number, a column for each subject: percent, and half of its 95 % interval."""
    rows = [row for result in results for row in result.rows]
    found = {(row.subject, row.key): cell(row) for row in rows}
    subjects = _encoders_first(results, list(dict.fromkeys(row.subject for row in rows)))
    table = _empty("protocol", subjects)
    for key in dict.fromkeys(row.key for row in rows):
        table.add_row(" ".join(key), *(found.get((subject, key), "") for subject in subjects))
    return table


def collapse(results: Sequence[Result]) -> Table:
    """A row for each measure, a column for each subject."""
    measured = {name: values for result in results for name, values in result.collapse.items()}
    subjects = _encoders_first(results, list(measured))
    table = _empty("measure", subjects)
    for key, (name, digits) in MEASURES.items():
        numbers = [measured[subject].get(key) for subject in subjects]
        if any(number is not None for number in numbers):
            table.add_row(name, *("" if v is None else f"{v:.{digits}f}" for v in numbers))
    return table


def width_of(results: Sequence[Result]) -> int:
    """Columns that the tables need, for where there is no terminal to say how many there are."""
    subjects = {row.subject for result in results for row in result.rows}
    return 28 + sum(max(11, *map(len, name.split())) + 2 for name in subjects)


def _empty(first: str, columns: Sequence[str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", min_width=11)
    return table


def differences(names: Sequence[str], compared: Sequence[Sequence[Compared]]) -> Table:
    """The first result's numbers, and beside them every other's and how far it is from the first.

    Args:
        names: of the results.
        compared: for each result after the first, its numbers against the first's.
    """
    table = _empty("protocol", names[:1])
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

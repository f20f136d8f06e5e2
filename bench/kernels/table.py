"""The rows of the comparison, for people and for machines."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

COLUMNS = ("way", "time", "MB", "GB/s", "of copy", "× published", "× stock", "peak MB")


@dataclass(frozen=True)
class Row:
    """A way at a case, timed or red.

    Attributes:
        seconds: the median of the rounds.
        bytes_moved: that must move, whatever a way moves.
        peak_bytes: of tensors held at a time during a call, above its inputs.
        of_copy: share of the speed of a copy of memory, timed in the same rounds.
        over_published, over_stock: how many times as fast as that way, the best one of several.
        red: why there is no time: its result was wrong.
    """

    op: str
    case: str
    phase: str
    dtype: str
    way: str
    kind: str
    how: str = ""
    rounds: int = 0
    seconds: float | None = None
    bytes_moved: int = 0
    peak_bytes: int | None = None
    gb_per_s: float = 0.0
    of_copy: float = 0.0
    over_published: float | None = None
    over_stock: float | None = None
    red: str = ""


def time_of(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def cells(row: Row) -> list[str]:
    if row.seconds is None:
        return [row.way, f"red: {row.red}", *[""] * (len(COLUMNS) - 2)]
    ratios = ["–" if ratio is None else f"{ratio:.2f}" for ratio in (row.over_published, row.over_stock)]
    time = time_of(row.seconds) + (" (launches)" if row.how == "launches" else "")
    return [
        row.way,
        time,
        f"{row.bytes_moved / 1e6:.1f}" if row.bytes_moved else "–",
        f"{row.gb_per_s:.1f}" if row.bytes_moved else "–",
        f"{row.of_copy:.0%}" if row.bytes_moved else "–",
        *ratios,
        "–" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}",
    ]


def aligned(lines: Sequence[Sequence[str]], names: Collection[int]) -> str:
    """A Markdown table whose first line is its heading; columns of names begin, numbers end in line."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = [i in names for i in range(len(widths))]

    def render(line: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(line, widths, left, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * width + ("-" if to_left else ":")) for width, to_left in zip(widths, left, strict=True)]
    return "\n".join([render(lines[0]), f"|-{'|-'.join(rule)}|", *map(render, lines[1:])])


def markdown(rows: Iterable[Row]) -> str:
    """A heading and a table for each case and phase."""
    parts = []
    for (op, case, phase, dtype), group in groupby(rows, lambda r: (r.op, r.case, r.phase, r.dtype)):
        table = aligned([COLUMNS, *[cells(row) for row in group]], names={0})
        parts.append(f"### `{op}` {phase}: {case}, {dtype}\n\n{table}")
    return "\n\n".join(parts) + "\n"


def summary(rows: Iterable[Row]) -> str:
    """One line for each case and phase: the op as a user gets it, against the best of the others."""
    lines = [("op", "case", "phase", "time", "of copy", "× published", "× stock", "best stock", "best peer")]
    for (op, case, phase, dtype), found in groupby(rows, lambda r: (r.op, r.case, r.phase, r.dtype)):
        group = list(found)
        timed = [row for row in group if row.seconds is not None]
        ours = next((row for row in timed if row.kind == "fastjepa"), None)
        start = (f"`{op}`", f"{case}, {dtype}", phase)
        if ours is None:
            lines.append((*start, "red", "", "", "", "", ""))
            continue
        _, time, _, _, of_copy, published, stock, _ = cells(ours)
        best = [
            min((row for row in timed if row.kind == kind), key=lambda row: row.seconds or 0, default=None)
            for kind in ("stock", "peer")
        ]
        names = ["–" if row is None else f"{row.way}, {time_of(row.seconds or 0)}" for row in best]
        lines.append((*start, time, of_copy, published, stock, names[0], names[1]))
    return aligned(lines, names={0, 1, 2, 7, 8})

"""Which rank has which elements of a checkpoint's files: worked out once, on rank 0.

A file of a checkpoint is the whole parameters one after another, sorted by name, whatever the ranks and the
ZeRO stage. It is cut into windows, and the windows of all files in turn into batches; each rank sends what it
has of a batch as one message, and rank 0 writes the pieces in their order. So no rank ever holds a whole
model. With many ranks at ZeRO 3 each has a little of every window: a batch is of more windows then.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

from fastjepa.engine.partitions import Slice

Shapes = Mapping[str, Sequence[int]]
WINDOW = 2**22  # elements: 16 MiB of fp32
AT_MOST = 8  # windows in a batch
WORTH_SENDING = 2**18  # elements, 1 MiB: a batch grows until messages are of so many on average


class Piece(NamedTuple):
    """Consecutive elements of a file, and where they are.

    Attributes:
        rank: that has them.
        part: which of the flat parts of that rank.
        at: the element of the part that they begin with.
        numel: elements.
    """

    rank: int
    part: int
    at: int
    numel: int


Window = tuple[Piece, ...]


@dataclass(frozen=True)
class FilePlan:
    """A file of a checkpoint.

    Attributes:
        shapes: of the parameters, in the order of the file.
        windows: its elements in their order, at most `WINDOW` of them in each.
    """

    shapes: dict[str, tuple[int, ...]]
    windows: tuple[Window, ...]


@dataclass
class Batch:
    """Windows that travel together.

    Attributes:
        windows: each with its file, in the order in which they are written.
        sent: by rank its pieces, each with its file, in the order of the windows: one message.
        numel: elements of each of these messages.
    """

    windows: list[tuple[str, Window]] = field(default_factory=list)
    sent: dict[int, list[tuple[str, Piece]]] = field(default_factory=dict)
    numel: dict[int, int] = field(default_factory=dict)

    def add(self, file: str, window: Window) -> None:
        self.windows.append((file, window))
        for piece in window:
            if piece.rank in self.sent:
                self.sent[piece.rank].append((file, piece))
                self.numel[piece.rank] += piece.numel
            else:
                self.sent[piece.rank] = [(file, piece)]
                self.numel[piece.rank] = piece.numel

    @property
    def is_full(self) -> bool:
        """Whether it is to be sent before more is added."""
        mean = sum(self.numel.values()) / len(self.numel)
        return len(self.windows) >= AT_MOST or mean >= WORTH_SENDING


def batches_of(plans: Mapping[str, FilePlan]) -> Iterator[Batch]:
    """Every window of every file in turn, in batches."""
    batch = Batch()
    for file, window in in_turn(plans):
        batch.add(file, window)
        if batch.is_full:
            yield batch
            batch = Batch()
    if batch.windows:
        yield batch


def plan_file(slices: Sequence[Sequence[Sequence[Slice]]], window: int = WINDOW) -> FilePlan:
    """Lay out one file.

    Args:
        slices: for each rank and each of its parts what is in it. Together every element exactly once.
        window: most elements of a window.
    """
    found: dict[str, list[tuple[int, Piece]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for rank, parts in enumerate(slices):
        for part, cuts in enumerate(parts):
            for s in cuts:
                shapes[s.name] = tuple(s.shape)
                found.setdefault(s.name, []).append((s.first, Piece(rank, part, s.at, s.count)))
    pieces: list[Piece] = []
    for name in sorted(shapes):
        end = 0
        for first, piece in sorted(found[name]):
            assert first == end, f"{name}: element {min(first, end)} is on no rank, or on two"
            end += piece.numel
            pieces.append(piece)
        assert end == math.prod(shapes[name]), f"{name}: element {end} is on no rank"
    return FilePlan({name: shapes[name] for name in sorted(shapes)}, tuple(_windows(pieces, window)))


def in_turn(plans: Mapping[str, FilePlan]) -> Iterator[tuple[str, Window]]:
    """Every window with its file; a window of each file in turn, so that they are written side by side."""
    for row in zip_longest(*(plan.windows for plan in plans.values())):
        yield from ((file, window) for file, window in zip(plans, row, strict=True) if window)


def _windows(pieces: Sequence[Piece], most: int) -> Iterator[Window]:
    """Cut into runs of `most` elements; neighbours on a rank are one piece."""
    window: list[Piece] = []
    room = most
    for rank, part, at, numel in pieces:
        end = at + numel
        while at < end:
            taken = min(room, end - at)
            last = window[-1] if window else None
            if last is not None and last[:2] == (rank, part) and last.at + last.numel == at:
                window[-1] = last._replace(numel=last.numel + taken)
            else:
                window.append(Piece(rank, part, at, taken))
            at, room = at + taken, room - taken
            if room == 0:
                yield tuple(window)
                window, room = [], most
    if window:
        yield tuple(window)

"""However the ranks have cut the parameters, the files are the same."""

import sys
from collections import deque
from collections.abc import Callable
from itertools import accumulate, pairwise
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastjepa.engine.checkpoints.plan import AT_MOST, WORTH_SENDING, Piece, batches_of, in_turn, plan_file
from fastjepa.engine.checkpoints.saver import put_together
from fastjepa.engine.partitions import FlatLayout, Slice

Sizes = dict[str, int]
SIZES = st.dictionaries(st.text("abc.", min_size=1, max_size=4), st.integers(1, 30), min_size=1, max_size=6)
Cut = list[list[tuple[Slice, ...]]]  # for each rank and part


def cut_flat(sizes: Sizes, ranks: int, gap: int) -> Cut:
    """As ZeRO 0 to 2: one buffer, aligned parameters, an equal part of it for each rank."""
    whole, at = [], 0
    for name, size in sizes.items():
        whole.append(Slice(name, torch.Size([size]), 0, at, size))
        at += size + gap
    numel = -(-at // ranks) * ranks
    part = numel // ranks
    return [[FlatLayout(tuple(whole), numel, rank * part).part(part)] for rank in range(ranks)]


def cut_each(sizes: Sizes, ranks: int) -> Cut:
    """As ZeRO 3: of each parameter an equal part for each rank, the last padded or empty."""
    every: Cut = []
    for rank in range(ranks):
        slices, at = [], 0
        for name, size in sizes.items():
            part = -(-size // ranks)
            count = min(part, size - rank * part)
            if count > 0:
                slices.append(Slice(name, torch.Size([size]), rank * part, at, count))
            at += part
        every.append([tuple(slices)])
    return every


@given(SIZES, st.integers(1, 5), st.integers(0, 3), st.booleans(), st.integers(1, 40))
def test_every_element_is_in_its_place_whatever_the_cut(
    sizes: Sizes, ranks: int, gap: int, scattered: bool, window: int
) -> None:
    cut = cut_each(sizes, ranks) if scattered else cut_flat(sizes, ranks, gap)
    plan = plan_file(cut, window)
    assert list(plan.shapes) == sorted(sizes)
    assert plan.shapes == {name: (size,) for name, size in sizes.items()}

    # Where a rank has what: the parameter's name and element, at each place of each part.
    there = {
        (rank, part, s.at + i): (s.name, s.first + i)
        for rank, parts in enumerate(cut)
        for part, slices in enumerate(parts)
        for s in slices
        for i in range(s.count)
    }
    pieces = [piece for w in plan.windows for piece in w]
    found = [there[p.rank, p.part, p.at + i] for p in pieces for i in range(p.numel)]
    assert found == [(name, i) for name in sorted(sizes) for i in range(sizes[name])]
    assert all(sum(p.numel for p in w) == window for w in plan.windows[:-1])
    assert 0 < sum(p.numel for p in plan.windows[-1]) <= window


@given(sizes=SIZES, ranks=st.integers(1, 5))
def test_neighbours_go_together(sizes: Sizes, ranks: int) -> None:
    (window,) = plan_file(cut_flat(dict(sorted(sizes.items())), ranks, gap=0)).windows
    assert [p.rank for p in window] == sorted({p.rank for p in window}), "a piece for each rank"
    for one, next_one in pairwise(plan_file(cut_each(sizes, ranks)).windows[0]):
        assert (one.rank, one.at + one.numel) != (next_one.rank, next_one.at)


def test_files_take_turns() -> None:
    long, short = plan_file(cut_flat({"a": 7}, 1, 0), window=3), plan_file(cut_flat({"b": 4}, 1, 0), window=3)
    assert list(in_turn({"long": long, "short": short})) == [
        ("long", (Piece(0, 0, 0, 3),)),
        ("short", (Piece(0, 0, 0, 3),)),
        ("long", (Piece(0, 0, 3, 3),)),
        ("short", (Piece(0, 0, 3, 1),)),
        ("long", (Piece(0, 0, 6, 1),)),
    ]


def lines_run(function: Callable[[], None]) -> int:
    """Lines of the package that it executes, in loops each time."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace if "fastjepa" in frame.f_code.co_filename else None

    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(None)
    return count


def test_each_piece_is_touched_a_few_times_however_many_ranks() -> None:
    """With a pass over each window for each rank it would be 64 times here."""
    sizes = {f"block.{i}": 640 for i in range(8)}
    cuts = {ranks: cut_each(sizes, ranks) for ranks in (4, 64)}
    spent: dict[int, float] = {}
    for ranks, cut in cuts.items():
        plans = {file: plan_file(cut, window=1000) for file in ("student", "target")}
        batches = list(batches_of(plans))
        pieces = sum(len(w) for b in batches for _, w in b.windows)
        messages = {
            (i, rank): np.zeros(n, np.float32) for i, b in enumerate(batches) for rank, n in b.numel.items()
        }
        own = {file: [np.zeros(sum(sizes.values()), np.float32)] for file in plans}

        def bookkeeping(
            plans: Any = plans, batches: Any = batches, messages: Any = messages, own: Any = own
        ) -> None:
            list(batches_of(plans))
            for i, batch in enumerate(batches):
                deque(put_together(batch, {r: messages[i, r] for r in batch.numel if r}, own), maxlen=0)

        spent[ranks] = lines_run(bookkeeping) / pieces
    assert spent[64] < 20, "lines for a piece"
    assert spent[64] < 2 * spent[4]


@given(SIZES, st.integers(1, 5), st.booleans(), st.integers(1, 40))
def test_messages_put_together_are_the_files(sizes: Sizes, ranks: int, scattered: bool, window: int) -> None:
    cut = cut_each(sizes, ranks) if scattered else cut_flat(sizes, ranks, 0)
    files = ("student", "target")
    batches = list(batches_of({file: plan_file(cut, window) for file in files}))
    names = sorted(sizes)
    begins = dict(zip(names, accumulate([0, *(sizes[name] for name in names)]), strict=False))
    # Every element of a file is its place there; the second file begins at 1000.
    parts = {
        (file, rank): [np.zeros(sum(s.at + s.count for s in part) + 1, np.float32) for part in cut[rank]]
        for file in files
        for rank in range(ranks)
    }
    for (file, rank), arrays in parts.items():
        for array, part in zip(arrays, cut[rank], strict=True):
            for s in part:
                first = begins[s.name] + s.first + 1000 * (file == "target")
                array[s.at : s.at + s.count] = np.arange(first, first + s.count)
    found: dict[str, list[float]] = {file: [] for file in files}
    for batch in batches:
        messages = {
            rank: np.concatenate([parts[file, rank][p.part][p.at : p.at + p.numel] for file, p in pieces])
            for rank, pieces in batch.sent.items()
        }
        assert {rank: len(message) for rank, message in messages.items()} == batch.numel
        messages.pop(0, None)
        for file, pieces in put_together(batch, messages, {file: parts[file, 0] for file in files}):
            found[file] += np.concatenate(pieces).tolist()
    total = sum(sizes.values())
    assert found == {"student": list(range(total)), "target": list(range(1000, 1000 + total))}


def test_with_many_ranks_messages_are_of_several_windows() -> None:
    sizes = {f"block.{i:02}": 2**16 for i in range(16)}
    few, many = (plan_file(cut_each(sizes, ranks), window=2**15) for ranks in (2, 512))
    assert [len(b.windows) for b in batches_of({"student": few})] == [AT_MOST] * (len(few.windows) // AT_MOST)
    sent = sum(len(b.numel) for b in batches_of({"student": many}))
    assert sent * 4 <= sum(len({p.rank for p in w}) for w in many.windows)
    large = plan_file(cut_each({"a": 4 * WORTH_SENDING}, 2), window=2 * WORTH_SENDING)
    assert [len(b.windows) for b in batches_of({"student": large})] == [1, 1], "no more than is needed"


@pytest.mark.parametrize("missing", [0, 1])
def test_an_element_on_no_rank_is_a_bug(missing: int) -> None:
    cut = cut_each({"a": 6, "b": 3}, 3)
    del cut[missing]
    with pytest.raises(AssertionError, match="is on no rank"):
        plan_file(cut)

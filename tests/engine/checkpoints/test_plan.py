"""However the ranks have cut the parameters, the files are the same."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastjepa.engine.checkpoints.plan import Piece, in_turn, plan_file
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


@pytest.mark.parametrize("missing", [0, 1])
def test_an_element_on_no_rank_is_a_bug(missing: int) -> None:
    cut = cut_each({"a": 6, "b": 3}, 3)
    del cut[missing]
    with pytest.raises(AssertionError, match="is on no rank"):
        plan_file(cut)

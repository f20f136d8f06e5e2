"""How flat groups are cut: every element of every parameter is on one rank, at the place its slice says."""

from itertools import accumulate

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastjepa.engine.partitions import FlatLayout, Partition, Slice


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[Slice], int, int]:
    """Parameters with gaps between them, the elements of a rank's part, and the ranks."""
    shapes = draw(st.lists(st.lists(st.integers(1, 5), min_size=0, max_size=3), min_size=1, max_size=5))
    sizes = [torch.Size(shape) for shape in shapes]
    gaps = draw(st.lists(st.integers(0, 7), min_size=len(sizes), max_size=len(sizes)))
    ends = list(accumulate(size.numel() + gap for size, gap in zip(sizes, gaps, strict=True)))
    whole = [
        Slice(f"p{number}", size, 0, end - gap - size.numel(), size.numel())
        for number, (size, gap, end) in enumerate(zip(sizes, gaps, ends, strict=True))
    ]
    ranks = draw(st.integers(1, 6))
    return whole, -(-ends[-1] // ranks), ranks


@given(layouts())
def test_the_parts_of_all_ranks_make_up_the_parameters(case: tuple[list[Slice], int, int]) -> None:
    whole, numel, ranks = case
    named = {s.name: torch.rand(s.shape) for s in whole}
    flat = torch.zeros(numel * ranks)
    again = {name: torch.full_like(tensor, -1) for name, tensor in named.items()}
    for rank in range(ranks):
        partition, part = partition_of(whole, numel, ranks, rank), flat[rank * numel : (rank + 1) * numel]
        partition.take(named, into=part)
        for s in partition.slices:
            here = again[s.name].view(-1)[s.first : s.first + s.count]
            assert (here == -1).all(), "an element is on two ranks"
            here.copy_(part[s.at : s.at + s.count])
    layout = FlatLayout(tuple(whole), numel * ranks, 0)
    for name, view in layout.split(flat).items():
        assert torch.equal(view, named[name])
        assert torch.equal(again[name], named[name])
    padding = flat.numel() - sum(s.count for s in whole)
    assert int((flat == 0).sum()) >= padding


@given(layouts())
def test_one_rank_has_it_whole(case: tuple[list[Slice], int, int]) -> None:
    whole, numel, ranks = case
    assert partition_of(whole, numel * ranks, 1, 0).is_whole
    assert partition_of(whole, numel, ranks, 0).is_whole == (ranks == 1)


def partition_of(whole: list[Slice], numel: int, ranks: int, rank: int) -> Partition:
    layout = FlatLayout(tuple(whole), numel * ranks, rank * numel)
    master: Tensor = torch.zeros(numel)
    return Partition(tuple(s.name for s in whole), layout.part(numel), master, master, layout)

"""Which bytes tensors share: found exactly, and quickly where nothing is unusual."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastjepa_kernels import overlap
from fastjepa_kernels.overlap import find_shared


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), max_size=2)),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 3),
    st.booleans(),
)
def test_shared_bytes_are_found_exactly(
    views: list[tuple[int, list[tuple[int, int]]]], written: int, tied: bool
) -> None:
    buffer = torch.zeros(64, dtype=torch.int16)
    tensors = [buffer.as_strided([n for n, _ in dims], [s for _, s in dims], start) for start, dims in views]
    tensors += tensors[written:] if tied else []
    held: list[list[int]] = []
    for tensor in tensors:
        places = torch.arange(64).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        held.append(places.flatten().tolist())
    apart, seen = True, set[int]()
    for positions in held[:written]:
        apart = apart and len(set(positions)) == len(positions) and seen.isdisjoint(positions)
        seen.update(positions)
    apart = apart and all(seen.isdisjoint(positions) for positions in held[written:])
    found = find_shared(tensors[:written], tensors[written:])
    assert (found is None) == apart
    if found is not None:
        first, second = found
        assert first < written
        assert set(held[first]) & set(held[second])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be looked at run by run, which takes milliseconds of every step of a model."""

    def fail(*_args: object) -> None:
        raise AssertionError("looked at run by run")

    monkeypatch.setattr(overlap, "_runs", fail)


@pytest.mark.usefixtures("quick")
def test_layouts_of_dense_tensors_are_told_apart_quickly() -> None:
    def tensors() -> list[Tensor]:
        convolution = torch.empty(4, 3, 2, 2, memory_format=torch.channels_last)
        return [torch.empty(5), convolution, torch.empty(3, 7).t(), torch.empty(0, 2), torch.empty(())]

    assert not tensors()[1].is_contiguous()
    assert find_shared(tensors(), tensors()) is None


@pytest.mark.usefixtures("quick")
def test_tied_sources_are_told_apart_quickly() -> None:
    tied = torch.empty(6, 2)
    assert find_shared([torch.empty(3), torch.empty(9)], [tied, torch.empty(4), tied.data, tied.t()]) is None


def test_of_sources_that_begin_together_each_is_looked_at() -> None:
    buffer = torch.empty(20)
    long, wide = buffer[:10], buffer.view(2, 10)[:, :5]  # as many bytes from the same address
    assert find_shared([buffer[12:13]], [wide, long]) == (0, 1)
    assert find_shared([buffer[12:13]], [long, wide]) == (0, 2)
    assert find_shared([buffer[6:9]], [buffer[:2], long]) == (0, 2)
    assert find_shared([long, long], [buffer[12:]]) == (0, 1)

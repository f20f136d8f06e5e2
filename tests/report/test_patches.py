from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjepa.report.patches import agreement, outline

blocks = st.lists(st.booleans(), min_size=20, max_size=20).map(lambda cells: np.reshape(cells, (4, 5)))


def test_a_rectangle_has_its_border_inside_it() -> None:
    block = np.zeros((4, 5), dtype=bool)
    block[1:3, 2:5] = True
    segments = outline(block, inset=0.1)
    assert len(segments) == 10
    points = np.array(segments).reshape(-1, 2)
    assert points.min(axis=0) == pytest.approx([2.1, 1.1])
    assert points.max(axis=0) == pytest.approx([4.9, 2.9])


def test_nothing_has_no_border() -> None:
    assert outline(np.zeros((3, 3), dtype=bool), inset=0.1) == []


@settings(deadline=None)
@given(block=blocks, inset=st.floats(0.01, 0.4))
def test_borders_close(block: np.ndarray, inset: float) -> None:
    """Every end of a segment is the end of another: also at inner corners and where cells touch corners."""
    ends = Counter((round(x, 6), round(y, 6)) for segment in outline(block, inset) for x, y in segment)
    assert all(count == 2 for count in ends.values())


@settings(deadline=None)
@given(block=blocks)
def test_segments_are_as_many_as_borders_of_cells(block: np.ndarray) -> None:
    padded = np.pad(block, 1).astype(int)
    borders = np.abs(np.diff(padded, axis=0)).sum() + np.abs(np.diff(padded, axis=1)).sum()
    assert len(outline(block, inset=0.2)) == borders


def test_agreement_is_one_for_the_same_colours_and_nothing_by_luck() -> None:
    one, other = np.random.default_rng(0).random((2, 8, 7, 7, 3))
    assert agreement(one, one) == pytest.approx(1)
    assert agreement(one, 1 - one) == pytest.approx(-1)
    assert abs(agreement(one, other)) < 0.1
    assert agreement(np.full_like(one, 0.5), one) == 0

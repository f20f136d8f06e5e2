import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastjepa.masks.blocks import Range, block_shape, smallest_area

SIDES = st.integers(1, 30)
CHANCES = st.floats(0, 1, exclude_max=True)


@st.composite
def ranges(draw: st.DrawFn, low: float, high: float) -> Range:
    first, second = draw(st.floats(low, high)), draw(st.floats(low, high))
    return min(first, second), max(first, second)


@pytest.mark.parametrize(
    ("grid", "published"), [((14, 14), (30, 40)), ((16, 16), (35, 54)), ((28, 28), (108, 154))]
)
def test_target_blocks_are_as_large_as_published(grid: tuple[int, int], published: tuple[int, int]) -> None:
    draws = [i / 4000 for i in range(4000)]
    areas = [block_shape(grid, (0.15, 0.2), (0.75, 1.5), r, r, below_side=True).area for r in draws]
    assert (min(areas), max(areas)) == published


@pytest.mark.parametrize(
    ("r", "aspect", "below_side", "expected"),
    [
        (0.0, (0.75, 1.5), True, (5, 6)),  # 29 patches at .75: sqrt(21.75) x sqrt(38.7)
        (0.0, (4.0, 4.0), True, (11, 3)),  # sqrt(116) x sqrt(7.25)
        (0.0, (9.0, 9.0), True, (13, 2)),  # sqrt(261) = 16.2 rows do not fit
        (0.0, (9.0, 9.0), False, (14, 2)),
    ],
)
def test_height_over_width_is_the_aspect(
    r: float, aspect: Range, below_side: bool, expected: tuple[int, int]
) -> None:
    shape = block_shape((14, 14), (0.15, 0.2), aspect, r, r, below_side=below_side)
    assert (shape.height, shape.width) == expected


@given(SIDES, SIDES, ranges(0.01, 1), ranges(0.1, 10), CHANCES, CHANCES, st.booleans())
@example(9, 4, (0.25, 0.25), (2.25, 4.0), 0.0, 0.0, False)  # sqrt(9 * 2.25) is 4.5: the end of a range counts
def test_no_draw_is_smaller_than_the_smallest(
    rows: int, columns: int, scale: Range, aspect: Range, r_scale: float, r_aspect: float, below_side: bool
) -> None:
    shape = block_shape((rows, columns), scale, aspect, r_scale, r_aspect, below_side=below_side)
    assert shape.height <= rows - below_side
    assert shape.width <= columns - below_side
    assert smallest_area((rows, columns), scale, aspect, below_side=below_side) <= shape.area


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 14), st.integers(2, 14), ranges(0.05, 1), ranges(0.5, 2), st.booleans())
def test_the_smallest_can_be_drawn(
    rows: int, columns: int, scale: Range, aspect: Range, below_side: bool
) -> None:
    grid, patches = (rows, columns), rows * columns
    bound = smallest_area(grid, scale, aspect, below_side=below_side)
    areas = range(int(patches * scale[0]), int(patches * scale[1]) + 1)
    drawn = [
        block_shape(grid, (area / patches + 1e-9,) * 2, aspect, 0, i / 500, below_side=below_side).area
        for area in areas
        for i in range(500)
    ]
    # A shape whose range of aspects is narrower than 1/500 of the whole is not among these draws.
    assert bound <= min(drawn)
    assert min(drawn) - bound <= max(rows, columns)

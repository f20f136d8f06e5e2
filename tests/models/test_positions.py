import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjepa.models.positions import places_in, sincos_1d, sincos_2d


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12).map(lambda n: 4 * n), st.booleans())
def test_columns_come_first_and_sines_before_cosines(
    rows: int, columns: int, width: int, class_token: bool
) -> None:
    table = sincos_2d((rows, columns), width, class_token)
    assert table.dtype == torch.float32
    assert table.shape == (1, rows * columns + class_token, width)
    quarter = width // 4
    for row in {0, rows // 2, rows - 1}:
        for column in {0, columns // 2, columns - 1}:
            expected = []
            for place in (column, row):
                angles = [place * 10000 ** (-i / quarter) for i in range(quarter)]
                expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            # Computed in fp32, an angle of 40 would be wrong by up to 2e-6.
            found = table[0, row * columns + column + class_token].double()
            torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=0, atol=1e-7)
    if class_token:
        assert not table[0, 0].any()


def test_a_width_that_cannot_be_quartered_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        sincos_2d((2, 2), 6)


@given(st.integers(1, 64), st.integers(1, 64))
def test_places_keep_to_the_side_that_was_trained(patches: int, trained: int) -> None:
    """Of one extent and one centre, evenly spaced, whatever the number of patches."""
    places = places_in(patches, trained)
    assert len(places) == patches
    assert places.mean() == pytest.approx((trained - 1) / 2)
    assert places[0] - 0.5 * trained / patches == pytest.approx(-0.5)
    if patches == trained:
        assert places.tolist() == list(range(patches)), "not one bit may change at the trained size"
    if patches % trained == 0 and (patches // trained) % 2:  # an odd multiple has a patch on each old centre
        assert places[patches // trained // 2 :: patches // trained] == pytest.approx(range(trained))


@given(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_each_side_is_scaled_by_itself(grid: tuple[int, int], trained: tuple[int, int]) -> None:
    table = sincos_2d(grid, 16, trained_grid=trained)[0].unflatten(0, grid)  # [rows, columns, 16]
    for half, side in ((table[0, :, :8], 1), (table[:, 0, 8:], 0)):  # the column first, then the row
        expected = sincos_1d(places_in(grid[side], trained[side]), 8)
        torch.testing.assert_close(half.double(), torch.from_numpy(expected), rtol=0, atol=1e-7)
    assert torch.equal(sincos_2d(trained, 16, trained_grid=trained), sincos_2d(trained, 16))


def test_computed_positions_are_what_interpolation_aims_at() -> None:
    """Bicubic interpolation of the table comes near them inside the grid, less so at its edges."""
    trained, grid = (14, 14), (28, 28)
    table = sincos_2d(trained, 768)[0].unflatten(0, trained).permute(2, 0, 1)[None]  # [1, D, rows, columns]
    bicubic = F.interpolate(table, grid, mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
    error = (sincos_2d(grid, 768, trained_grid=trained)[0].unflatten(0, grid) - bicubic).abs()
    assert error[5:-5, 5:-5].max().item() == pytest.approx(0.032, abs=1e-3)  # as docs/export.md says
    assert error.max().item() == pytest.approx(0.16, abs=5e-3)

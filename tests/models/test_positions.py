import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjepa.models.positions import sincos_2d


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

from itertools import accumulate

import torch
from hypothesis import given
from hypothesis import strategies as st

from fastjepa_kernels.sequences import rows_in_sequences, sequence_of_rows


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.integers(0, 4))
def test_every_row_knows_its_sequence(lengths: list[int], past_the_end: int) -> None:
    starts = torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32)
    rows = sum(lengths) + past_the_end
    owners = [owner for owner, length in enumerate(lengths) for _ in range(length)]
    assert sequence_of_rows(starts, rows).tolist() == owners + [len(lengths) - 1] * past_the_end
    assert rows_in_sequences(starts, rows).tolist() == [True] * len(owners) + [False] * past_the_end

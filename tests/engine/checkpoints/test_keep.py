"""Which checkpoints stay."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjepa.engine.checkpoints.checkpoint import checkpoint_path, list_checkpoints, step_of
from fastjepa.engine.checkpoints.keep import Keep, prune


@given(
    steps=st.sets(st.integers(1, 10**9) | st.integers(1, 20), min_size=1, max_size=8),
    keep=st.builds(Keep, st.integers(1, 4), st.none() | st.integers(1, 5), st.none() | st.integers(0, 9)),
    data=st.data(),
)
@settings(deadline=None, max_examples=50)
def test_the_last_and_the_first_of_every_n_and_those_to_go_back_to_stay(
    tmp_path_factory: pytest.TempPathFactory, steps: set[int], keep: Keep, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("keep")
    for step in steps:
        checkpoint_path(directory, step).mkdir()
    now = data.draw(st.sampled_from(sorted(steps)))
    prune(directory, now, keep)
    left = {step_of(path) for path in list_checkpoints(directory)}
    later = {step for step in steps if step > now}
    known = steps - later
    stay = set(sorted(known)[-keep.last :])
    if keep.every:
        stay |= {
            s for s in known if s >= keep.every and not known & set(range(s // keep.every * keep.every, s))
        }
    if keep.back is not None:
        stay |= {s for s in known if s > now - keep.back}
        stay |= {max((s for s in known if s <= now - keep.back), default=now)}
    assert left == later | stay
    assert now in left, "the newest good one"
    assert len(list(directory.iterdir())) == len(left)


@pytest.mark.parametrize(
    ("keep", "damaged", "left"),
    [
        (Keep(2), set(), [30, 40]),
        (Keep(2), {30}, [20, 30, 40]),
        (Keep(2), {20}, [30, 40]),
        (Keep(1), {30}, [40]),
        (Keep(3), {20, 30}, [10, 20, 30, 40]),
        (Keep(1, every=20), {20, 30}, [20, 40]),
        (Keep(2), {40}, [30, 40]),  # it is written anew now
    ],
)
def test_damaged_ones_do_not_count(tmp_path: Path, keep: Keep, damaged: set[int], left: list[int]) -> None:
    for step in (10, 20, 30, 40):
        checkpoint_path(tmp_path, step).mkdir()
    prune(tmp_path, 40, keep, frozenset(checkpoint_path(tmp_path, step) for step in damaged))
    assert sorted(map(step_of, list_checkpoints(tmp_path))) == left


def test_reasons() -> None:
    assert Keep(2, 10).reasons([5, 10, 20, 25, 28]) == {
        28: "newest",
        25: "one of the last 2",
        20: "every 10",
        10: "every 10",
    }
    assert Keep(1).reasons([]) == {}
    # A step that was skipped is no checkpoint: the next one is, and counts for it.
    assert Keep(1, 10).reasons([5, 11, 15, 20, 25, 30]) == {30: "newest", 20: "every 10", 11: "every 10"}
    assert Keep(1, back=7).reasons([5, 10, 15, 20, 25]) == {
        25: "newest",
        20: "to go back to",
        15: "to go back to",
    }

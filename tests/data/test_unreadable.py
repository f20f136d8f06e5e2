import logging
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastjepa.data.unreadable import TooManyUnreadable, UnreadableCounter, UnreadableImage, tolerated


def bad(count: int, start: int = 0) -> dict[str, str]:
    return {f"/images/{i}.jpg": "empty" for i in range(start, start + count)}


@pytest.mark.parametrize(
    ("tried", "images", "expected"),
    [
        (1, 1, 2),
        (10, 10, 2),
        (60, 60, 3),
        (5, 1_000_000, 10),
        (200, 1_000_000, 10),
        (40_000, 1_000_000, 2000),
    ],
)
def test_tolerated(tried: int, images: int, expected: int) -> None:
    assert tolerated(tried, images) == expected


def test_five_per_cent_pass_and_one_more_stops() -> None:
    counter = UnreadableCounter(400)
    counter.update(torch.arange(380), bad(20))
    with pytest.raises(TooManyUnreadable, match=r"21 of 401 images .*at most 5%.*") as stop:
        counter.update(torch.arange(380), bad(1, start=20))
    assert "/images/0.jpg: empty" in str(stop.value)
    assert "/images/9.jpg" not in str(stop.value)


def test_an_image_counts_once_and_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    counter = UnreadableCounter(20)
    with caplog.at_level(logging.WARNING):
        for _ in range(50):
            counter.update(torch.tensor([1, 2, 3]), bad(2))
    assert [record.getMessage() for record in caplog.records] == [
        "skipped /images/0.jpg: empty",
        "skipped /images/1.jpg: empty",
    ]
    assert counter.reasons == bad(2)


def test_a_wholly_bad_small_folder_stops() -> None:
    counter = UnreadableCounter(10)
    counter.update(torch.tensor([9]), bad(2))
    with pytest.raises(TooManyUnreadable, match="3 of 4"):
        counter.update(torch.tensor([9]), bad(3))


def test_bad_luck_at_the_start_does_not_stop_a_large_set() -> None:
    UnreadableCounter(100_000).update(torch.arange(30), bad(10))


def test_the_error_survives_a_trip_between_processes() -> None:
    error = pickle.loads(pickle.dumps(UnreadableImage("/a.jpg", "empty")))
    assert (error.path, error.reason, str(error)) == ("/a.jpg", "empty", "/a.jpg: empty")


@given(st.integers(0, 10**6), st.integers(1, 10**6), st.floats(0, 1))
def test_a_larger_fraction_tolerates_no_fewer(tried: int, images: int, fraction: float) -> None:
    assert tolerated(tried, images, 0.0) == 0
    assert tolerated(tried, images, fraction / 2) <= tolerated(tried, images, fraction)
    assert tolerated(tried, images, 1.0) >= tried


def test_a_fraction_of_nothing_stops_at_the_first() -> None:
    with pytest.raises(TooManyUnreadable, match=r"1 of 1001 images cannot be read; at most 0% are skipped"):
        UnreadableCounter(2000, max_bad_fraction=0.0).update(torch.arange(1000), bad(1))
    lenient = UnreadableCounter(400, max_bad_fraction=0.25)
    lenient.update(torch.arange(300), bad(100))
    with pytest.raises(TooManyUnreadable, match=r"101 of 401 .*at most 25% are skipped"):
        lenient.update(torch.arange(300), bad(1, start=100))

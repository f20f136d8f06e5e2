"""The order of batches and of failures. tests/gpu/test_step.py tests what copies really do, on a GPU."""

from collections.abc import Iterator

import pytest
import torch

from fastjepa.data.loader import Batch
from fastjepa.engine import prefetch
from fastjepa.engine.prefetch import in_steps, on_device
from fastjepa.masks import Masks

CPU = torch.device("cpu")


def batch(number: int) -> Batch:
    index = torch.full((1, 2), number)
    masks = Masks(index, index[None], None, index.flatten(), index[None])
    return Batch(torch.full((1, 1, 2, 2), number), index[:, 0], masks, 0, number, {})


def some(count: int, then: Exception | None = None) -> Iterator[Batch]:
    yield from map(batch, range(count))
    if then is not None:
        raise then


def numbers(steps: Iterator[list[Batch]]) -> list[list[int]]:
    return [[batch.step for batch in step] for step in steps]


def test_micro_batches_come_by_steps() -> None:
    assert numbers(in_steps(some(6), 2)) == [[0, 1], [2, 3], [4, 5]]
    assert numbers(in_steps(some(0), 2)) == []


def test_on_the_cpu_nothing_is_read_ahead_or_copied() -> None:
    read = []

    def noted() -> Iterator[Batch]:
        for one in some(3):
            read.append(one.step)
            yield one

    steps = on_device(in_steps(noted(), 1), CPU)
    assert read == []
    (first,) = next(steps)
    assert read == [0]
    assert torch.equal(first.images, batch(0).images)
    assert numbers(steps) == [[1], [2]]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Copies to a GPU that are only written down."""
    found: list[str] = []

    def begin(micro_batches: list[Batch], *_rest: object) -> tuple[list[Batch], None]:
        found.append(f"copy {micro_batches[0].step}")
        return micro_batches, None

    def take(micro_batches: list[Batch], _event: object) -> list[Batch]:
        found.append(f"take {micro_batches[0].step}")
        return micro_batches

    monkeypatch.setattr(prefetch, "_begin_copies", begin)
    monkeypatch.setattr(prefetch, "_take", take)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    return found


def test_a_step_is_handed_out_without_a_wait_for_the_next(events: list[str]) -> None:
    def noted() -> Iterator[Batch]:
        for one in some(3):
            events.append(f"read {one.step}")
            yield one

    steps = on_device(in_steps(noted(), 1), torch.device("cuda"))
    for number in range(3):
        assert next(steps)[0].step == number
        assert events == [f"{what} {number}" for what in ("read", "copy", "take")]
        events.clear()
    assert next(steps, None) is None


def test_a_failure_comes_after_the_steps_before_it(events: list[str]) -> None:
    steps = on_device(in_steps(some(2, then=ValueError("torn")), 1), torch.device("cuda"))
    assert next(steps)[0].step == 0
    assert next(steps)[0].step == 1
    with pytest.raises(ValueError, match="torn"):
        next(steps)
    assert events[-1] == "take 1"


def test_nothing_to_train_is_nothing_to_copy(events: list[str]) -> None:
    assert list(on_device(in_steps(some(0), 1), torch.device("cuda"))) == []
    assert not events


def test_every_tensor_of_a_batch_is_kept_for_the_stream_that_reads_it() -> None:
    tensors = prefetch._tensors(batch(1))
    assert len(tensors) == 5  # images, and all of the masks but cu_seqlens

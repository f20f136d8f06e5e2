"""Saving from a GPU: what is written is the state of its step, though training goes on meanwhile."""

import mmap
from pathlib import Path

import pytest
import torch

from fastjepa.engine.checkpoints.checkpoint import Position, checkpoint_path, load_checkpoint, state_of
from fastjepa.engine.checkpoints.host import buffer, host_copy
from fastjepa.engine.checkpoints.keep import Keep
from fastjepa.engine.checkpoints.saver import Job, Saver
from fastjepa.engine.partitions import FlatLayout, Partition, Parts, Slice

NUMEL = 3 * 2**22 + 5  # a few windows, and no power of two
DEVICE = torch.device("cuda")


def state_on_the_device() -> tuple[dict[str, Parts], torch.Tensor]:
    whole = (Slice("a", torch.Size([NUMEL]), 0, 0, NUMEL),)
    master = torch.zeros(NUMEL, device=DEVICE)
    partition = Partition(("a",), whole, master, master, FlatLayout(whole, NUMEL, 0))
    return {"student": Parts([partition], [master])}, master


def keep_busy(master: torch.Tensor, value: float) -> None:
    """Work that the device has not begun when this returns, and that ends with `value` everywhere."""
    torch.cuda._sleep(200_000_000)
    master.fill_(value)


def test_the_copy_waits_for_what_was_issued_before_it_and_not_after() -> None:
    state, master = state_on_the_device()
    copy = host_copy(state, None)
    for value in (1.0, 2.0, 3.0):
        keep_busy(master, value)
        copy.take(state)
        master.fill_(-1.0)
        (here,) = copy.parts["student"]
        assert not here.is_cuda
        assert bool((here == value).all())
        torch.cuda.synchronize()
        assert bool((here == value).all()), "training wrote into the copy"


def test_what_is_written_is_of_the_moment_of_the_save(tmp_path: Path) -> None:
    state, master = state_on_the_device()
    saver = Saver(state, None)
    for step in (1, 2):
        keep_busy(master, float(step))
        expected = torch.arange(NUMEL, dtype=torch.float32, device=DEVICE).remainder_(1000).add_(step)
        master.copy_(expected)
        state_json = state_of(Position(step, 0, 0.0, 0, 0), {}, {})
        saver.start(state, Job(tmp_path, step, state_json, Keep(5)))
        turns = 0
        while saver.is_busy or turns < 3:  # as training does, on its own stream
            master.add_(1.0)
            turns += 1
        assert saver.wait() is None
        written = load_checkpoint(checkpoint_path(tmp_path, step)).tensors["student"]["a"]
        assert torch.equal(written, expected.cpu())


def test_buffers_are_page_locked_and_of_no_more_than_their_size() -> None:
    flat = buffer(NUMEL, DEVICE)
    assert flat.is_pinned(), "CUDA knows the memory"
    assert flat.untyped_storage().nbytes() <= 4 * NUMEL + mmap.PAGESIZE
    assert not flat.any()
    del flat
    again = buffer(NUMEL, DEVICE)
    assert again.is_pinned(), "the one before was given back"


@pytest.mark.parametrize("numel", [0, 1])
def test_small_buffers(numel: int) -> None:
    assert buffer(numel, DEVICE).tolist() == [0.0] * numel

"""The next step's batches are copied to the device while this step is computed."""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor

from fastjepa.data.loader import Batch


def in_steps(batches: Iterable[Batch], accumulation: int) -> Iterator[list[Batch]]:
    """The micro-batches of each step, `accumulation` of them."""
    batches = iter(batches)
    while micro_batches := list(islice(batches, accumulation)):
        yield micro_batches


def on_device(
    steps: Iterable[list[Batch]], device: torch.device, ahead: bool = True
) -> Iterator[list[Batch]]:
    """The micro-batches of each step, on the device.

    With `ahead` on a GPU, a step is handed out when the copies of the next one have begun, on a stream of
    their own; two steps' batches are on the device then. The current stream waits for the copies of its step,
    the host for none, as long as the batches are in pinned memory.

    Args:
        steps: micro-batches on the host. What it raises is raised where that step's turn has come.
        device: where to.
        ahead: whether to read one step ahead. On the CPU nothing is copied, nor read ahead.
    """
    if not ahead or device.type != "cuda":
        for micro_batches in steps:
            yield [batch.to(device) for batch in micro_batches]
        return
    stream = torch.cuda.Stream(device)
    waiting: tuple[list[Batch], torch.cuda.Event] | None = None
    failure: Exception | None = None
    source = iter(steps)
    while failure is None:
        following = None
        try:
            following = _begin_copies(next(source), device, stream)
        except StopIteration:
            pass
        except Exception as error:  # whatever it is; the step before it comes first
            failure = error
        if waiting is not None:
            yield _take(*waiting)
        if following is None:
            break
        waiting = following
    if failure is not None:
        raise failure


def _begin_copies(
    micro_batches: list[Batch], device: torch.device, stream: torch.cuda.Stream
) -> tuple[list[Batch], torch.cuda.Event]:
    with torch.cuda.stream(stream):
        copies = [batch.to(device) for batch in micro_batches]
    event = torch.cuda.Event()
    event.record(stream)
    return copies, event


def _take(copies: list[Batch], arrived: torch.cuda.Event) -> list[Batch]:
    """For the current stream, which waits until they are there."""
    current = torch.cuda.current_stream(copies[0].images.device)
    current.wait_event(arrived)
    for batch in copies:
        for tensor in _tensors(batch):
            # It was allocated for the other stream, which must not write there before this one has read.
            tensor.record_stream(current)
    return copies


def _tensors(batch: Batch) -> list[Tensor]:
    return [batch.images, *(tensor for tensor in vars(batch.masks).values() if tensor is not None)]

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

    With `ahead` on a GPU, copies run on a stream of their own, beside the step that was handed out before:
    the host has only launched that one when it asks for the next. Two steps' batches are on the device then.
    The current stream waits for the copies of its step, the host for none, as long as the batches are in
    pinned memory; and no step waits for the loader to have read the one after it.

    Args:
        steps: micro-batches on the host.
        device: where to.
        ahead: whether to copy beside the step before. On the CPU nothing is copied.
    """
    if not ahead or device.type != "cuda":
        for micro_batches in steps:
            yield [batch.to(device) for batch in micro_batches]
        return
    stream = torch.cuda.Stream(device)
    for micro_batches in steps:
        yield _take(*_begin_copies(micro_batches, device, stream))


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

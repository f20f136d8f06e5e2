"""Nothing waits for the device, so every op can be captured in a CUDA graph and replayed on new data."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from bench.kernels.case import Case, Phase, Random, Way, arrange, gradient_of, map_tensors, tensors_of
from bench.kernels.check import results


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("takes")
def test_neither_pass_waits_for_the_device(case: Case, way: Way, random: Random) -> None:
    inputs = case.make(random)
    gradient = gradient_of(case, inputs, random)
    with no_waiting():
        results(case, way, inputs, gradient)


def test_waiting_would_be_seen() -> None:
    one = torch.ones(1, device="cuda")
    with pytest.raises(RuntimeError, match="synchronizing"), no_waiting():
        one.item()


@pytest.mark.usefixtures("takes")
def test_a_captured_graph_computes_on_new_data(case: Case, way: Way, random: Random) -> None:
    inputs = case.make(random)
    gradient = gradient_of(case, inputs, random)
    phase: Phase = "forward+backward" if case.with_gradient else "forward"
    call = arrange(case, way.call, phase, inputs, gradient)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = tensors_of(call())

    for _ in range(2):
        fresh = case.make(random)
        fresh_gradient = None if gradient is None else torch.randn_like(gradient)
        expected = results(case, way, map_tensors(torch.clone, fresh), fresh_gradient)
        new, old = tensors_of((fresh, fresh_gradient)), tensors_of((inputs, gradient))
        for to, source in zip(old, new, strict=True):
            to.copy_(source)
        for out in captured:
            if not any(out.data_ptr() == given.data_ptr() for given in old):  # what is not updated in place
                out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        for out, right in zip(captured, expected, strict=True):
            torch.testing.assert_close(out, right)

"""On the device: as exact as torch in the same dtype, and the same bits every time, on any stream."""

from dataclasses import replace

import pytest
import torch

from bench.kernels.case import Case, Random, Way, gradient_of, map_tensors, tensors_of
from bench.kernels.check import check, results

# torch promises no bits for its own kernels: index_add_ and some attention backwards add in any order.
OURS = ("fastjepa:triton", "fastjepa:cuda")


@pytest.mark.usefixtures("takes")
def test_errors_are_at_most_twice_torch_s_own(case: Case, way: Way, random: Random) -> None:
    alone = replace(case, ways=lambda device_type: [way, case.stock(device_type)])
    verdicts = check(alone, random)
    assert verdicts.red == {}
    assert way.name in verdicts.right


@pytest.mark.usefixtures("takes")
def test_two_runs_give_the_same_bits(case: Case, way: Way, random: Random) -> None:
    if way.name not in OURS:
        pytest.skip("only our own kernels promise it")
    inputs = case.make(random)
    gradient = gradient_of(case, inputs, random)
    first = results(case, way, inputs, gradient)
    for _ in range(5):
        for out, again in zip(first, results(case, way, inputs, gradient), strict=True):
            assert torch.equal(out, again)


@pytest.mark.usefixtures("takes")
def test_work_on_another_stream_waits_for_its_inputs(case: Case, way: Way, random: Random) -> None:
    inputs = case.make(random)
    gradient = gradient_of(case, inputs, random)
    expected = results(case, way, inputs, gradient)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = map_tensors(torch.empty_like, inputs)
        torch.cuda._sleep(20_000_000)  # ten milliseconds, so that work on the default stream would be early
        for to, source in zip(tensors_of(late), tensors_of(inputs), strict=True):
            to.copy_(source)
        out = results(case, way, late, gradient)
    stream.synchronize()
    for one, other in zip(out, expected, strict=True):
        torch.testing.assert_close(one, other)

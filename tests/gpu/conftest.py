"""Needs a CUDA device: every test here is skipped without one. The cases are those of the benchmarks."""

from pathlib import Path

import pytest
import torch

from bench.kernels import bench_adamw, bench_attention, bench_ema, bench_gather, bench_loss, bench_patchify
from bench.kernels.case import CANNOT, Case, Random, Way, gradient_of
from bench.kernels.check import is_ours, results

HERE = Path(__file__).parent
OPS = (bench_gather, bench_patchify, bench_attention, bench_loss, bench_ema, bench_adamw)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA = torch.device("cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("gpu")
            if not torch.cuda.is_available():
                item.add_marker(missing)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every op at every small size, in every dtype, as a user gets it and by each of its implementations."""
    if {"case", "way"} <= set(metafunc.fixturenames):
        pairs = [
            pytest.param(case, way, id=f"{case}-{way.name}")
            for op in OPS
            for dtype in DTYPES
            for case in op.cases("small", dtype)
            for way in case.ways("cuda")
            if is_ours(way.name)
        ]
        metafunc.parametrize(("case", "way"), pairs)


@pytest.fixture
def random() -> Random:
    return Random.on(CUDA)


@pytest.fixture
def takes(case: Case, way: Way, random: Random) -> None:
    """Skips what an implementation does not take; and compiles it, which may wait for the device."""
    inputs = case.make(random)
    try:
        results(case, way, inputs, gradient_of(case, inputs, random))
    except ValueError as refusal:
        if CANNOT not in str(refusal):
            raise
        pytest.skip(str(refusal))
    torch.cuda.synchronize()

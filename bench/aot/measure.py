"""Compilations in several processes, each into an empty cache."""

import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

from bench.aot.compile import Compilation, compiled
from bench.aot.resources import Resources, read

_work: list[Compilation] = []  # the processes inherit it: a kernel cannot be sent to them


def measure(work: list[Compilation], jobs: int) -> Iterator[Resources | str]:
    """In their order, the resources of each or why it does not compile."""
    _work[:] = work
    # One that was compiled before would not be compiled again.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
            yield from pool.map(_measure, range(len(work)))


def _measure(place: int) -> Resources | str:
    try:
        return read(compiled(_work[place]))
    except Exception as error:  # of any of the compilers
        # Triton quotes the kernel first and says what is wrong last.
        return f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"

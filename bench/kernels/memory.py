"""The memory that tensors take on the CPU during a call, from what the allocator reports to the profiler."""

import os
from collections.abc import Callable
from itertools import accumulate
from typing import Any

from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its notes would stand between the lines of a table


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes of tensors held at a time during `call`, above those held before it.

    What is allocated in C++ through torch counts too; std::vector and malloc do not.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()  # not freed before the end is recorded
    del kept
    events = profiler.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in changes), initial=0))

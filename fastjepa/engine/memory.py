"""Memory of the host that one step frees and the next asks for again."""

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # glibc's numbers of what mallopt sets
_SET_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed, as torch keeps a GPU's memory. For the whole process.

    Left alone, glibc gives every large tensor back to the kernel, and a step begins anew on pages that each
    cost a fault and a clearing: a tenth of its time. What is kept is at most about what a step held at its
    peak.

    Returns:
        whether it does: not with another C library, nor where the environment says how malloc is to be.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _SET_BY_USER):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # From the heap, which never shrinks, rather than as a mapping of its own, which goes as it is freed.
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))

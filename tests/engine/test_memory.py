import subprocess
import sys

import pytest

from fastjepa.engine import memory

# Of a tensor of 40 MB made and freed again and again: faults once the heap has found room for it, which takes
# a few times.
_FAULTS = """
import resource, torch
from fastjepa.engine.memory import keep_freed_memory
print(keep_freed_memory())
torch.set_num_threads(1)
for _ in range(20):
    torch.ones(10_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
def test_what_is_freed_is_had_again_without_a_fault() -> None:
    done = subprocess.run([sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    if kept == "True":
        assert int(faults) < 10_000  # of 50 000 pages


def test_settings_of_the_user_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    assert not memory.keep_freed_memory()


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))
    assert not memory.keep_freed_memory()

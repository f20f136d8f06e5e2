"""Which implementation of an op runs: what can run here, what was asked for, what was measured fastest.

A preference is process-wide, as torch's own switches are: autograd runs backward passes in threads of its
own. The public functions hand it to their op as an argument, so a backward pass follows its forward pass.
"""

import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch

from fastjepa_kernels.language import HAS_TRITON, INTERPRETED
from fastjepa_kernels.native import HAS_CPP, HAS_CUDA

# Where each can run. varlen, fa2 and fa4 look for their packages themselves.
_RUNS_ON: dict[str, Callable[[str], bool]] = {
    "triton": lambda device: HAS_TRITON and (device == "cuda" or (device == "cpu" and INTERPRETED)),
    "cuda": lambda device: HAS_CUDA and device == "cuda",
    "cpp": lambda device: HAS_CPP and device == "cpu",
    "torch": lambda device: True,
    "sdpa": lambda device: True,
    "cudnn": lambda device: device == "cuda",
    "varlen": lambda device: device == "cuda",
    "fa2": lambda device: device == "cuda",
    "fa4": lambda device: device == "cuda",
}
_STRICT = "!"  # ends a preference that must be met


def _takes_anything(*_args: Any) -> bool:
    return True


@dataclass(frozen=True)
class Way:
    """One implementation of an op. All ways of an op have the same signature.

    Attributes:
        name: one of the names that `use` takes.
        run: called with the op's arguments.
        takes: whether it can run with these arguments, by what the host knows of them.
        installed: whether what it needs besides a device is there.
    """

    name: str
    run: Callable[..., Any]
    takes: Callable[..., bool] = _takes_anything
    installed: Callable[[], bool] = lambda: True

    def runs_on(self, device_type: str) -> bool:
        return _RUNS_ON[self.name](device_type) and self.installed()


_OPS: dict[str, "Ways"] = {}


class Ways:
    """The implementations of one op, best first for a device that nobody has measured.

    Args:
        op: the name of the public function, with `_backward` for its gradient.
        ways: best first.
        size: from the op's arguments, the numbers that the table of a device goes by.
    """

    def __init__(self, op: str, *ways: Way, size: Callable[..., tuple[int, ...]] = lambda *_args: ()) -> None:
        self.op, self.ways, self.size = op, ways, size
        self._on: dict[str, list[Way]] = {}
        _OPS[op] = self

    def on(self, device_type: str) -> list[Way]:
        """Those that can run there, best first."""
        if device_type not in self._on:
            there = [way for way in self.ways if way.runs_on(device_type)]
            # The interpreter is there to be tested, not to be fast.
            there.sort(key=lambda way: way.name == "triton" and device_type == "cpu")
            self._on[device_type] = there
        return self._on[device_type]

    def pick(self, preference: str, device: torch.device, *args: Any) -> Way:
        """The way to run: what was asked for, else the fastest measured, else the first."""
        ways = self.on(device.type)

        def called(name: str) -> Way | None:
            return next((way for way in ways if way.name == name and way.takes(*args)), None)

        asked = preference.removesuffix(_STRICT)
        chosen = called(asked)
        if chosen is None and preference.endswith(_STRICT) and not self._follows(asked):
            possible = ", ".join(way.name for way in ways if way.takes(*args))
            raise ValueError(
                f"{self.op} cannot run as {asked!r} with these arguments on {device.type}; "
                f"it can as {possible}. Without strict=True the best of them runs."
            )
        device_name = _device_name(device)
        if chosen is None and self.op in _table(device_name):
            chosen = called(_fastest_on(device_name, self.op, self.size(*args)))
        return chosen or next(way for way in ways if way.takes(*args))

    def _follows(self, asked: str) -> bool:
        """Whether this is a gradient that has no implementation of that name: its op ran as asked."""
        return self.op.endswith("_backward") and all(way.name != asked for way in self.ways)

    def __call__(self, preference: str, device: torch.device, *args: Any) -> Any:
        run = self.pick(preference, device, *args).run
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):  # Triton launches on the current device, wherever the tensors are
                return run(*args)
        return run(*args)


@dataclass(frozen=True)
class Measured:
    """A row of a device's table: at this size, this implementation was the fastest."""

    size: tuple[int, ...]
    fastest: str


def fastest(table: tuple[Measured, ...], size: tuple[int, ...]) -> str:
    """What the row of the nearest size names, by ratio; "" without a row."""

    def distance(row: Measured) -> float:
        return sum(abs(math.log((a + 1) / (b + 1))) for a, b in zip(row.size, size, strict=True))

    return min(table, key=distance).fastest if table else ""


def table_name(device_name: str) -> str:
    """The file of a device's table: nvidia_h200.json for "NVIDIA H200"."""
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_") + ".json"


def parse_table(text: str) -> Mapping[str, tuple[Measured, ...]]:
    """Of each op, what was measured: {"ops": {"ema_update_": [{"size": [1], "fastest": "cpp"}]}}."""
    ops = json.loads(text)["ops"]
    return {
        op: tuple(Measured(tuple(row["size"]), row["fastest"]) for row in rows) for op, rows in ops.items()
    }


@functools.cache
def _table(device_name: str) -> Mapping[str, tuple[Measured, ...]]:
    path = files("fastjepa_kernels") / "tables" / table_name(device_name)
    return parse_table(path.read_text(encoding="utf-8")) if path.is_file() else {}


@functools.lru_cache(maxsize=4096)
def _fastest_on(device_name: str, op: str, size: tuple[int, ...]) -> str:
    return fastest(_table(device_name).get(op, ()), size)


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _known(name: str) -> str:
    if name not in _RUNS_ON:
        raise ValueError(f"no implementation is called {name!r}; there are {', '.join(_RUNS_ON)}")
    return name


def _preference_of_environment() -> str:
    name = os.environ.get("FASTJEPA_KERNELS", "")
    if name and name not in _RUNS_ON:
        raise ValueError(f"FASTJEPA_KERNELS={name}: it must be one of {', '.join(_RUNS_ON)}")
    return name


_preference = _preference_of_environment()


def preference() -> str:
    """What was asked for, to be handed to an op; "" if nothing was."""
    return _preference


@contextmanager
def use(name: str, *, strict: bool = False) -> Iterator[None]:
    """Prefer one implementation of every op, in the whole process, until the block ends.

    An op without it, or whose arguments it does not take, runs as its next best. The environment variable
    FASTJEPA_KERNELS says the same for a whole run. Blocks of different threads must not overlap: the one that
    ends last would leave behind what it found when it began.

    Args:
        name: "triton", "cuda", "cpp", "torch", and for attention "sdpa", "cudnn", "varlen", "fa2", "fa4".
        strict: raise instead where it cannot run. The gradient of an op that has no implementation of that
            name for gradients runs as its next best all the same.

    Raises:
        ValueError: an unknown name; with `strict`, from the op that cannot run so.
    """
    global _preference
    before, _preference = _preference, _known(name) + (_STRICT if strict else "")
    try:
        yield
    finally:
        _preference = before


def implementations(op: str, device: str | torch.device | None = None) -> list[str]:
    """The implementations of an op that can run here, best first.

    Args:
        op: such as "gather_tokens" or "gather_tokens_backward".
        device: "cuda" or "cpu"; by default the GPU where there is one.

    Raises:
        ValueError: there is no such op.
    """
    if op not in _OPS:
        raise ValueError(f"no op is called {op!r}; there are {', '.join(_OPS)}")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    return [way.name for way in _OPS[op].on(torch.device(device or default).type)]

"""The binaries that the cases run, each once, on every target."""

from collections.abc import Iterable
from dataclasses import dataclass

from bench.aot.capture import launches
from bench.aot.cases import Case
from bench.aot.compile import ARCHITECTURES, Compilation, specialise
from bench.aot.table import Key


@dataclass
class Shipped:
    """One binary, the first of the cases that run it, and what its gates ask for."""

    compilation: Compilation
    case: Case
    vector_loads: bool = False  # have to be among its loads
    vector_stores: bool = False
    most_registers: int | None = None

    @property
    def key(self) -> Key:
        return self.compilation.key


def shipped(cases: Iterable[Case]) -> dict[Key, Shipped]:
    """By key, in the order of the cases."""
    found: dict[Key, Shipped] = {}
    for case in cases:
        for target, architecture in ARCHITECTURES.items():
            try:
                launched = launches(case.host, case.arguments, architecture)
                compilations = [specialise(launch, target) for launch in launched]
            except Exception as error:
                error.add_note(f"This was {case} for {target}.")
                raise
            for compilation in compilations:
                one = found.setdefault(compilation.key, Shipped(compilation, case))
                one.vector_loads |= case.aligned
                one.vector_stores |= case.aligned and case.stores
                one.most_registers = one.most_registers or case.most_registers.get(target)
    return found


def each_kernel_once(every: dict[Key, Shipped]) -> dict[Key, Shipped]:
    """Of each kernel and target the first."""
    first: dict[tuple[str, str], Key] = {}
    for kernel, target, launch in every:
        first.setdefault((kernel, target), (kernel, target, launch))
    return {key: every[key] for key in first.values()}

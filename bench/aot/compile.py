"""Triton's compiler without a GPU: a launch becomes what its JIT would compile, and that a binary."""

from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from bench.aot.capture import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "gfx942": 942}
# Triton 3.10 changes the default; registers must not change with it unseen.
ALWAYS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Compilation:
    """A kernel with everything that its binary depends on. `launch` is the readable form of it."""

    kernel: Any  # JITFunction
    target: str
    launch: str
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.kernel.__module__.rpartition('.')[2]}.{self.kernel.__name__}"

    @property
    def key(self) -> tuple[str, str, str]:
        """Two launches with the same key share one binary."""
        return self.name, self.target, self.launch


def specialise(launch: Launch, target: str) -> Compilation:
    """What Triton's JIT would compile for a launch: by its own rules, so Triton's own code says which."""
    kernel, keywords = launch.kernel, ALWAYS | launch.keywords
    backend = make_backend(TARGETS[target])
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, rest = bind(*launch.arguments, **keywords)
    options, signature, constants, attributes = kernel._pack_args(
        backend, keywords, bound, specialization, rest
    )
    said = [_spell(*each) for each in specialization]
    text = " ".join(
        f"{parameter.name}={each}" if parameter.is_constexpr else each
        for parameter, each in zip(kernel.params, said, strict=True)
    )
    chosen = {"num_warps": options.num_warps, "num_stages": options.num_stages}
    chosen |= {name: value for name, value in launch.keywords.items() if name not in bound}
    text += "; " + " ".join(f"{name}={value}" for name, value in chosen.items())
    return Compilation(kernel, target, text, signature, constants, attributes, options.__dict__)


def _spell(kind: str, value: Any) -> str:
    """`*bf16/16` is a pointer, or an integer, known to be a multiple of 16; s: to less than 2 GiB."""
    if kind == "constexpr":
        return str(value)
    return kind + {"": "", "D": "/16", "S": "s", "DS": "/16s"}[value or ""]


def compiled(compilation: Compilation) -> Any:
    """Triton's CompiledKernel: its `asm` and `metadata` need no driver, its `n_regs` would start one."""
    source = ASTSource(
        compilation.kernel, compilation.signature, compilation.constants, compilation.attributes
    )
    return triton.compile(source, target=TARGETS[compilation.target], options=compilation.options)

"""What a compiled kernel takes of a GPU, read from its binary and its assembly."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from triton import knobs


@dataclass(frozen=True)
class Resources:
    """Bytes and instructions are of one thread where nothing else is said."""

    registers: int  # vector registers on gfx942, accumulation registers among them
    scalar_registers: int  # of a wave; gfx942 only
    shared: int  # bytes of a program: shared memory, or LDS
    tensor_memory: int  # columns of a program; sm_100 only
    stack: int  # bytes
    local: int  # bytes of local memory that are not of the stack
    spills: int  # instructions that read or write local memory; on gfx942 spilled vector registers
    scalar_spills: int  # spilled scalar registers; gfx942 only
    loads: int  # instructions that read global memory
    vector_loads: int  # those of them with 8 bytes or more
    stores: int
    vector_stores: int
    matrix: dict[str, int] = field(default_factory=dict)  # matrix instructions by name
    dots: int = 0  # in the source, of those that matrix instructions can do
    wide_dots: int = 0  # dots with M of at least 64
    narrow: int = 0  # wide dots left to instructions with M = 16; sm_90 and sm_100 only


def read(kernel: Any) -> Resources:
    """The resources of Triton's CompiledKernel. Starts no driver."""
    shared, tensor_memory = kernel.metadata.shared, getattr(kernel.metadata, "tmem_size", None) or 0
    dots, wide_dots = count_dots(kernel.asm["ttir"])
    if "cubin" not in kernel.asm:
        found = parse_amdgcn(kernel.asm["amdgcn"])
        return Resources(shared=shared, tensor_memory=0, dots=dots, wide_dots=wide_dots, **found)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        found = parse_usage(_cuobjdump("-res-usage", file.name), kernel.metadata.name)
        found |= parse_sass(_cuobjdump("-sass", file.name))
    narrow = count_dots(kernel.asm["ttgir"])[1] if kernel.metadata.target.arch >= 90 else 0
    return Resources(
        shared=shared,
        tensor_memory=tensor_memory,
        scalar_registers=0,
        scalar_spills=0,
        dots=dots,
        wide_dots=wide_dots,
        narrow=narrow,
        **found,
    )


def _cuobjdump(what: str, path: str) -> str:
    command = [knobs.nvidia.cuobjdump.path, what, path]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def parse_usage(text: str, function: str) -> dict[str, Any]:
    """Of `cuobjdump -res-usage`."""
    # SHARED is left out: it knows nothing of what a kernel is given when it is launched.
    found = re.search(
        rf"Function {re.escape(function)}:\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text
    )
    if found is None:
        raise ValueError(f"cuobjdump says nothing of {function}: {text!r}")
    return dict(zip(("registers", "stack", "local"), map(int, found.groups()), strict=True))


def parse_sass(text: str) -> dict[str, Any]:
    """Of `cuobjdump -sass`."""
    instructions = re.findall(
        r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text, re.MULTILINE
    )
    if not instructions:
        raise ValueError("no instruction was found in what cuobjdump says")
    loads = [name for name in instructions if re.match(r"(LDG|LDGSTS)\b", name)]
    stores = [name for name in instructions if re.match(r"STG\b", name)]
    matrix = Counter(
        name.split(".")[0] for name in instructions if re.match(r"([HIQDB]G?MMA|OMMA|UTC\w*MMA)\b", name)
    )
    return {
        "spills": sum(1 for name in instructions if re.match(r"(LDL|STL)\b", name)),
        "loads": len(loads),
        "vector_loads": _vectors(r"\.(64|128|256)\b", loads),
        "stores": len(stores),
        "vector_stores": _vectors(r"\.(64|128|256)\b", stores),
        "matrix": dict(sorted(matrix.items())),
    }


def parse_amdgcn(text: str) -> dict[str, Any]:
    """Of the assembly for gfx942, whose metadata LLVM writes at its end."""

    def metadata(name: str) -> int:
        found = re.findall(rf"^\s+(?:- )?\.{name}:\s+(\d+)$", text, re.MULTILINE)
        if len(found) != 1:
            raise ValueError(f"the assembly has {len(found)} entries .{name} where one is expected")
        return int(found[0])

    loads = re.findall(r"^\s+(?:global|buffer|flat)_load_(\w+)", text, re.MULTILINE)
    stores = re.findall(r"^\s+(?:global|buffer|flat)_store_(\w+)", text, re.MULTILINE)
    matrix = Counter(re.findall(r"^\s+(v_s?mfma)_\w+", text, re.MULTILINE))
    return {
        "registers": metadata("vgpr_count"),
        "scalar_registers": metadata("sgpr_count"),
        "stack": metadata("private_segment_fixed_size"),
        "local": 0,
        "spills": metadata("vgpr_spill_count"),
        "scalar_spills": metadata("sgpr_spill_count"),
        "loads": len(loads),
        "vector_loads": _vectors(r"dwordx[234]\b", loads),
        "stores": len(stores),
        "vector_stores": _vectors(r"dwordx[234]\b", stores),
        "matrix": dict(sorted(matrix.items())),
    }


def _vectors(pattern: str, instructions: list[str]) -> int:
    return sum(1 for name in instructions if re.search(pattern, name))


def count_dots(ir: str) -> tuple[int, int]:
    """How many `tt.dot` matrix instructions can do, and how many of those have M of at least 64."""
    # Exact fp32 has no matrix instructions on NVIDIA's. In three dimensions the first is the batch.
    found = re.findall(r"= tt\.dot (.*)-> tensor<(?:\d+x)*?(\d+)x\d+xf\d+", ir)
    rows = [
        int(rows)
        for operands, rows in found
        if not ("xf32" in operands.split("*")[0] and "tf32" not in operands)
    ]
    return len(rows), sum(1 for m in rows if m >= 64)

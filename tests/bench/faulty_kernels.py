"""Kernels with a fault each, compiled for all targets: a program, because the interpreter is off in it.

Prints as JSON {kernel: {target: [what the gates say]}}, and what else needs kernels that can be compiled.
"""

# The parameters of kernels have no types.
# mypy: disable-error-code=no-untyped-def

import json
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from bench.aot import gates
from bench.aot.capture import launches
from bench.aot.compile import ARCHITECTURES, specialise
from bench.aot.measure import measure


@triton.jit
def product(x, y, out, M: tl.constexpr, K: tl.constexpr):
    row, column = tl.arange(0, M)[:, None], tl.arange(0, K)[None, :]
    a = tl.load(x + row * K + column)
    b = tl.load(y + row * K + column)
    tl.store(out + row * M + tl.arange(0, M)[None, :], tl.dot(a, b.T))


@triton.jit
def spilling(x, out, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    values = tl.load(x + place)
    # Every value is needed again once their sum is known.
    tl.store(out + place, values - tl.sum(values) / SIZE)


@triton.jit
def scalar_loads(x, out, stride, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(out + place, tl.load(x + place * stride))


@triton.jit
def scalar_stores(x, out, stride, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(out + place * stride, tl.load(x + place))


@triton.jit
def uncompilable(x, out, SIZE: tl.constexpr):
    tl.store(out + tl.arange(0, SIZE), tl.load(x + tl.arange(0, SIZE + 1)))


def main() -> None:
    bf16 = torch.empty(4096, dtype=torch.bfloat16, device="meta")
    fp32 = torch.empty(4096, device="meta")
    runs: dict[str, Callable[[int], object]] = {
        "sound": lambda _: product[(1,)](bf16, bf16, fp32, M=64, K=64, num_warps=4),
        # Twice the registers of a thread: 255 on NVIDIA's, 512 on gfx942.
        "spilling": lambda number: spilling[(1,)](fp32, fp32, SIZE=65536, num_warps=4 if number < 900 else 2),
        "scalar_loads": lambda _: scalar_loads[(1,)](fp32, fp32, 3, SIZE=1024, num_warps=4),
        "scalar_stores": lambda _: scalar_stores[(1,)](fp32, fp32, 3, SIZE=1024, num_warps=4),
        "crowding": lambda _: product[(1,)](bf16, bf16, fp32, M=128, K=512, num_warps=8),
        "uncompilable": lambda _: uncompilable[(1,)](fp32, fp32, SIZE=1024, num_warps=4),
        # wgmma and tcgen05 take a group of four.
        "two_warps": lambda _: product[(1,)](bf16, bf16, fp32, M=64, K=64, num_warps=2),
    }
    work = [
        specialise(launches(run, (architecture,), architecture)[0], target)
        for run in runs.values()
        for target, architecture in ARCHITECTURES.items()
    ]
    measured = measure(work, jobs=1)
    said = {}
    for name in runs:
        said[name] = {
            target: [now]
            if isinstance(now, str)
            else gates.absolute(target, now, vector_loads=True, vector_stores=True)
            for target in ARCHITECTURES
            for now in [next(measured)]
        }

    def alike() -> None:
        for x, stride in ((fp32, 16), (fp32[1:], 3), (fp32, 1)):
            scalar_loads[lambda sizes: (sizes["SIZE"] // 1024,)](
                x, fp32, stride, SIZE=1024, num_warps=4, num_stages=2
            )

    said["launches"] = {"sm_90": [specialise(each, "sm_90").launch for each in launches(alike, (), 90)]}
    try:
        launches(lambda: scalar_loads[(1, 65536)](fp32, fp32, 3, SIZE=1024), (), 90)
    except ValueError as error:
        said["grid"] = {"sm_90": [str(error)]}
    print(json.dumps(said))


if __name__ == "__main__":
    main()

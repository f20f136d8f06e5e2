"""Time whole training steps of fastjepa, and of MAE and I-JEPA as published and modernised, side by side.

    python -m bench.throughput --sizes base,large,huge --limit-s 240
    python -m bench.throughput --sizes base --rows main
    python -m bench.throughput --device cpu

Results are written after each round, those of rows that torch.compile makes after all others; a row that
fails says why.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch._dynamo

from bench.kernels import machine
from bench.kernels.results import RESULTS
from bench.throughput import report
from bench.throughput.entries import Entry, chosen
from bench.throughput.gauges import Gauge, gauge_for
from bench.throughput.race import Race
from bench.throughput.setting import POOL, SHAPES, Inputs, Setting

_SHAPES_COMPILED = 256  # of one block's code, in a process: torch gives up after 8 and runs it uncompiled


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.throughput", description=__doc__.splitlines()[0])
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if has_gpu else "cpu")
    parser.add_argument("--sizes", help=f"some of {', '.join(SHAPES)}, by commas")
    parser.add_argument("--batch", help="images of a step, one number or one for each size by commas")
    parser.add_argument("--rows", default="all", help="main, switch, all, or names of rows, by semicolons")
    parser.add_argument("--no-compile", action="store_true", help="leave out rows that torch.compile makes")
    parser.add_argument("--rounds", type=int, help="of which the table has medians: 6 on a GPU, 5 on a CPU")
    parser.add_argument("--steps", type=int, default=4, help="of a row in a round, at most")
    parser.add_argument(
        "--draws", type=int, help="batches of masks, gone through in turn: 12 on a GPU, 6 on a CPU"
    )
    parser.add_argument("--limit-s", type=float, default=540.0, help="seconds for everything, about")
    parser.add_argument("--row-limit-s", type=float, default=150.0, help="to build a row and warm it up")
    parser.add_argument("--mae-precision", choices=("fp32", "bf16", "fp16"), help="of the reference MAE")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--quick", action="store_true", help="toy shapes and few rounds, to try the code")
    parser.add_argument("--results", type=Path, help="folder of the results, bench/results by default")
    asked = parser.parse_args(arguments)
    on_gpu = asked.device == "cuda"
    asked.rounds, asked.draws = asked.rounds or (6 if on_gpu else 5), asked.draws or (12 if on_gpu else 6)
    asked.sizes = (
        asked.sizes or ("toy" if asked.quick else "base,large,huge" if on_gpu else "small-6")
    ).split(",")
    unknown = [size for size in asked.sizes if size not in SHAPES]
    if unknown:
        parser.error(f"no such size: {', '.join(unknown)}; there are {', '.join(SHAPES)}")
    batches = [
        int(n) for n in (asked.batch or ("4" if asked.quick else "128" if on_gpu else "16")).split(",")
    ]
    if len(batches) not in (1, len(asked.sizes)) or min(batches) < 1:
        parser.error(
            f"--batch must be one number or one for each of {len(asked.sizes)} sizes, got {asked.batch}"
        )
    asked.batches = batches * len(asked.sizes) if len(batches) == 1 else batches
    if on_gpu and not has_gpu:
        parser.error("torch sees no CUDA device; --device cpu measures on the CPU")
    if asked.quick:
        asked.rounds, asked.steps, asked.draws = 2, 1, 4
    else:  # what is quick is no measurement, and written only where it is told to
        asked.results = asked.results or RESULTS
    try:
        entries = chosen(asked.rows.split(";"))
    except ValueError as error:
        parser.error(str(error))
    asked.entries = [entry for entry in entries if not (asked.no_compile and entry.compiles)]
    return asked


def measure(
    setting: Setting,
    asked: argparse.Namespace,
    gauge: Gauge,
    deadline_s: float,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """One size; `keep` takes what is known of it after each round, the last time the most."""
    start_s = time.monotonic()
    race = Race(Inputs(setting), gauge, asked.rounds, asked.steps, deadline_s, asked.row_limit_s)
    gauge.gemm_s.clear()
    gauge.copy_s.clear()
    groups: list[list[Entry]] = [[e for e in asked.entries if e.compiles == c] for c in (False, True)]

    def keep_now() -> None:
        keep(report.size_of(race, time.monotonic() - start_s))

    try:
        for group in filter(None, groups):
            for entry in group:
                one = race.add(entry)
                built = f"built in {one.built_s:.1f} s"
                said = one.red or f"{setting.batch / one.expected_s:.4g} images/s at first, {built}"
                print(f"{setting.size}: {entry.name}: {said}", flush=True)
            race.run(keep_now)
    finally:  # whatever ends it, what was measured is kept: a GPU is not always to be had
        keep_now()
        race.free_all()


def main(arguments: Sequence[str] | None = None) -> int:
    asked = parse(arguments)
    start_s = time.monotonic()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    torch._dynamo.config.recompile_limit = _SHAPES_COMPILED
    torch._dynamo.config.accumulated_recompile_limit = 4 * _SHAPES_COMPILED
    device = torch.device(asked.device)
    facts = machine.facts(device)
    print(f"# Throughput on {facts['device']}\n", flush=True)
    precision: Literal["bf16", "fp32"] = "bf16" if asked.device == "cuda" else "fp32"
    pool = max(16 if asked.quick else POOL, asked.draws)
    sizes: list[dict[str, Any]] = []
    gauge = gauge_for(device, asked.quick)
    for place, (size, batch) in enumerate(zip(asked.sizes, asked.batches, strict=True)):
        left_s = asked.limit_s - (time.monotonic() - start_s)
        # What a size leaves over, the next may have.
        deadline_s = time.monotonic() + left_s / (len(asked.sizes) - place)
        setting = Setting(size, batch, device, precision, asked.mae_precision or precision, asked.draws, pool)

        def keep(found: dict[str, Any], place: int = place) -> None:
            sizes[place:] = [found]
            if asked.results:
                report.save(asked.results, facts, sizes)

        measure(setting, asked, gauge, deadline_s, keep)
        print(f"\n## {report.heading(sizes[-1])}\n\n{report.markdown(sizes[-1]['rows'])}\n", flush=True)
    if asked.results:
        print(f"Wrote {report.save(asked.results, facts, sizes, finished=True)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Time the parts of a training step beside what a roofline says, and list the kernels that take the most.

The parts cannot be seen in the replay of a whole step: steps are launched kernel by kernel
(speed.cuda_graph=none), and speed.cuda_graph=step is refused.

python -m bench.breakdown --size base
python -m bench.breakdown --size huge --batch 64 --mode packed --set speed.fused_blocks=false
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from bench.breakdown.report import page
from bench.breakdown.roofline import Cost, Rates, costs
from bench.breakdown.stopwatch import PARTS, Stopwatch, watched
from bench.kernels import machine
from bench.kernels.results import RESULTS
from bench.throughput import ours
from bench.throughput.gauges import Kernel, gauge_for, host_seconds_of, seconds_of, trace
from bench.throughput.report import write
from bench.throughput.setting import POOL, SHAPES, Inputs, Setting, tokens_of
from fastjepa.engine.learner import Learner
from fastjepa.models.flops import Narrow, Skipped
from fastjepa.objectives import JEPA
from fastjepa_kernels.choice import table_name

TOP = 25  # kernels that are listed
CUDA_GRAPH = "speed.cuda_graph"


@dataclass(frozen=True)
class Part:
    """A line of the table: what was measured, and what the roofline says."""

    name: str
    seconds: float
    predicted_s: float | None
    flop: float
    bytes_moved: float


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.breakdown", description=__doc__.splitlines()[0])
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if has_gpu else "cpu")
    parser.add_argument("--size", choices=sorted(SHAPES), help="base on a GPU, small-6 on a CPU")
    parser.add_argument("--batch", type=int, help="images of a step: 128 on a GPU, 32 on a CPU")
    parser.add_argument("--mode", choices=("truncate", "budget", "packed"), default="truncate")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", dest="overrides")
    parser.add_argument("--rounds", type=int, default=8, help="of whole steps, of which the median counts")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--quick", action="store_true", help="toy shapes, to try the code")
    parser.add_argument("--results", type=Path, help="folder of the results, bench/results by default")
    asked = parser.parse_args(arguments)
    if asked.device == "cuda" and not has_gpu:
        parser.error("torch sees no CUDA device; --device cpu measures on the CPU")
    on_gpu = asked.device == "cuda"
    graphs = [value for key, _, value in (o.partition("=") for o in asked.overrides) if key == CUDA_GRAPH]
    if not graphs:
        asked.overrides = [f"{CUDA_GRAPH}=none", *asked.overrides]
    elif graphs[-1] in ("step", "auto"):
        parser.error(
            f"{CUDA_GRAPH}={graphs[-1]} replays the whole step, and its parts cannot be told apart: use "
            "none, or bench.throughput for the time of a replayed step"
        )
    asked.size = asked.size or ("toy" if asked.quick else "base" if on_gpu else "small-6")
    asked.batch = asked.batch or (4 if asked.quick else 128 if on_gpu else 32)
    if asked.quick:
        asked.rounds = 2
    else:
        asked.results = asked.results or RESULTS
    return asked


def predicted(inputs: Inputs, learner: Learner, mode: str) -> dict[str, Cost]:
    """The mean over the steps."""
    setting, model = inputs.setting, learner.model
    assert isinstance(model, JEPA)
    steps = []
    for masks in inputs.masks(mode):  # type: ignore[arg-type]
        rows = masks.asked_rows if model.skip_dead_work else None
        steps.append(
            costs(
                setting.shape(),
                Narrow(*setting.predictor[:2]),
                tokens_of(masks),
                None if rows is None else Skipped(rows.numel()),
                element_bytes=model.encoder.norm.weight.element_size(),
                encoder_parameters=sum(p.numel() for p in model.encoder.parameters()),
                predictor_parameters=sum(p.numel() for p in model.predictor.parameters()),
                averages_apart=learner.follows_apart,
            )
        )
    return {
        name: Cost(
            sum(step[name].flop for step in steps) / len(steps),
            sum(step[name].bytes_moved for step in steps) / len(steps),
        )
        for name in steps[0]
    }


def measure(setting: Setting, asked: argparse.Namespace) -> dict[str, Any]:
    """What the file says of a size."""
    device, inputs = setting.device, Inputs(setting)
    config = setting.config(f"masks.mode={asked.mode}", *asked.overrides)
    gauge = gauge_for(device, asked.quick)
    learner = ours.learner_of(config, device)
    batches = ours.batches_of(config, inputs)

    def step(number: int) -> object:
        return learner.step([batches[number % len(batches)]], ours.RATES)

    for number in range(len(batches)):
        step(number)
    walls, hosts = [], []
    for number in range(asked.rounds):
        gauge.read()
        hosts.append(host_seconds_of(lambda: step(number), device))  # noqa: B023
        walls.append(seconds_of(lambda: [step(number), step(number + 1)], device) / 2)  # noqa: B023
    seen = trace(lambda: [step(number) for number in range(3)], device)

    watch = Stopwatch(device)
    with watched(learner, watch):
        step(0)
        watch.marks.clear()
        # Without a wait in between, so that the host is ahead of the device as it is in training.
        for number in range(len(batches)):
            step(number)
        spent = watch.seconds()
    rates = Rates(gauge.flop_per_s, gauge.bytes_per_s)
    roof = predicted(inputs, learner, asked.mode)
    parts = []
    for name in PARTS:
        if name in spent:
            cost = roof.get(name, Cost())
            took_s = spent[name] / len(batches)
            parts.append(Part(name, took_s, cost.seconds(rates) or None, cost.flop, cost.bytes_moved))
    step_s, busy_s = median(walls), None if seen.busy_s is None else seen.busy_s / 3
    kernels = sorted(seen.kernels, key=lambda kernel: kernel.seconds, reverse=True)
    return {
        "size": setting.size,
        "mode": asked.mode,
        "overrides": asked.overrides,
        "batch": setting.batch,
        "precision": setting.precision,
        "step_s": step_s,
        "host_s": median(hosts),
        "busy_s": busy_s,
        "idle_s": None if busy_s is None else max(0.0, step_s - busy_s),
        "input_copy_s": _input_copy_s(inputs, device),
        "gemm_flop_per_s": rates.flop_per_s,
        "copy_bytes_per_s": rates.bytes_per_s,
        "launches": None if seen.launches is None else seen.launches / 3,
        "kernel_calls": seen.calls / 3,
        "kernel_s": sum(kernel.seconds for kernel in kernels) / 3,
        "parts": [asdict(part) for part in parts],
        "kernels": [
            asdict(Kernel(k.name, k.calls, k.seconds / 3)) | {"calls": k.calls / 3} for k in kernels[:TOP]
        ],
    }


def _input_copy_s(inputs: Inputs, device: torch.device) -> float | None:
    """To bring the pixels of a step from pinned memory, where nothing hides it; None on a CPU."""
    if device.type != "cuda":
        return None
    pinned = inputs.pixels[0].cpu().pin_memory()
    pinned.to(device, non_blocking=True)
    return median(seconds_of(lambda: pinned.to(device, non_blocking=True), device) for _ in range(5))


def main(arguments: Sequence[str] | None = None) -> int:
    asked = parse(arguments)
    start_s = time.monotonic()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    device = torch.device(asked.device)
    facts = machine.facts(device)
    precision: Literal["bf16", "fp32"] = "bf16" if asked.device == "cuda" else "fp32"
    pool = 16 if asked.quick else POOL
    found = measure(Setting(asked.size, asked.batch, device, precision, precision, pool=pool), asked)
    content = {**facts, "seconds": round(time.monotonic() - start_s), **found}
    text = page(content)
    print(text)
    if asked.results:
        folder = asked.results / table_name(facts["device"]).removesuffix(".json")
        path = folder / f"breakdown-{asked.size}-{facts['date']}.json"
        write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        write(path.with_suffix(".md"), text)
        print(f"Wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

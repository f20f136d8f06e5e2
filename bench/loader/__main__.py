"""Measure how fast images come to the step: by source and decoder, beside a plain DataLoader and webdataset.

python -m bench.loader
python -m bench.loader --photographs 128 --rounds 3 --memory-images 10000
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench.kernels import machine
from bench.kernels.results import RESULTS
from bench.loader import gauges
from bench.loader.contenders import contenders
from bench.loader.photographs import write_photographs
from bench.throughput.report import write
from fastjepa.data.packing.encode import Packing
from fastjepa.data.packing.pack import pack

BASELINE = "DataLoader, ImageFolder, uint8"
WARM = 32  # images read before anything is timed


def race(folder: Path, shards: Path, small: Path, images: int, rounds: int) -> dict[str, dict[str, float]]:
    """Images per second of one core, the contenders taking turns; medians over rounds.

    `per_cpu_second` counts the time that the core worked for it, which other work on the machine changes
    least; `per_second` all the time.
    """
    for contender in contenders(folder, shards, small, WARM).values():
        contender(0)
    speeds: dict[str, list[tuple[float, float]]] = {}
    for number in range(rounds):
        for name, contender in contenders(folder, shards, small, images).items():
            begin_s, cpu_s = time.perf_counter(), time.process_time()
            read = contender(number)
            wall_s, cpu_s = time.perf_counter() - begin_s, time.process_time() - cpu_s
            speeds.setdefault(name, []).append((read / wall_s, read / cpu_s))
    base = [cpu for _, cpu in speeds[BASELINE]]
    return {
        name: {
            "per_second": median(wall for wall, _ in of_rounds),
            "per_cpu_second": median(cpu for _, cpu in of_rounds),
            # Of the same round, whose machine was as busy.
            "ratio": median(cpu / other for (_, cpu), other in zip(of_rounds, base, strict=True)),
        }
        for name, of_rounds in speeds.items()
    }


def race_pack(folder: Path, scratch: Path, workers: int, rounds: int) -> dict[str, float]:
    """Packing beside decoding and encoding alone, in turns."""
    packed, encoded = [], []
    for number in range(rounds):
        encoded.append(gauges.encode_images_per_second(folder, workers))
        packed.append(gauges.pack_images_per_second(folder, scratch / f"again-{number}", workers))
    ratio = median(p / e for p, e in zip(packed, encoded, strict=True))
    return {
        "pack_images_per_second": median(packed),
        "encode_images_per_second": median(encoded),
        "ratio": ratio,
        "workers": workers,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.loader", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--photographs", type=int, default=256, help="that are made")
    parser.add_argument("--rounds", type=int, default=7, help="of which the median counts")
    parser.add_argument("--memory-images", type=int, default=100_000, help="read over and over; 0 for none")
    parser.add_argument("--rate", type=float, default=400, help="images/s that a consumer takes")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="where the images lie meanwhile")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    facts = machine.facts(torch.device("cpu")) | {"load_before": os.getloadavg()[0]}
    facts |= {name: version(name) for name in ("pillow", "torchvision", "webdataset")}
    with TemporaryDirectory(prefix="loader-", dir=options.folder, ignore_cleanup_errors=True) as below:
        scratch = Path(below)
        folder, shards, small = scratch / "images", scratch / "shards", scratch / "small"
        file_bytes = write_photographs(folder, options.photographs)
        pack(folder, shards, Packing(short_side=10_000, copy_small=True, shard_bytes=5_000_000))
        small_bytes = pack(folder, small, Packing(shard_bytes=5_000_000)).size / options.photographs
        found: dict[str, dict[str, Any]] = {
            "images_per_second_of_one_core": race(folder, shards, small, options.photographs, options.rounds),
            "pack": race_pack(folder, scratch, options.workers, max(3, options.rounds // 2)),
            "wait": {
                "fraction": gauges.wait_fraction(small, options.rate, options.workers),
                "images_per_second": options.rate,
                "workers": options.workers,
            },
        }
        (scratch / "large").mkdir()
        gauges.write_large_index(scratch / "large")
        resume_s = median(gauges.resume_s(scratch / "large", seed) for seed in range(5))
        found["resume"] = {"seconds": resume_s, "images": gauges.INDEXED}
        if options.memory_images:
            found["memory"] = gauges.memory_mib(small, options.memory_images)
    content = facts | {"load_after": os.getloadavg()[0], "rounds": options.rounds, "baseline": BASELINE}
    content |= {"photographs": options.photographs, "file_bytes": file_bytes, "packed_bytes": small_bytes}
    path = options.results / "cpu" / f"loader-{facts['date']}.json"
    write(path, json.dumps(content | found, indent=1) + "\n")
    say(found)
    print(path)
    return 0


def say(found: dict[str, dict[str, Any]]) -> None:
    for name, value in found.items():
        print(name)
        for key, of in value.items():
            shown = ", ".join(f"{k} {v:.4g}" for k, v in of.items()) if isinstance(of, dict) else f"{of:.4g}"
            print(f"  {key:58} {shown}")


if __name__ == "__main__":
    sys.exit(main())

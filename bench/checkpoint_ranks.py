"""Measure what rank 0 does besides receiving and writing, for a large model at ZeRO 3 on many ranks.

python -m bench.checkpoint_ranks
python -m bench.checkpoint_ranks --ranks 1024 --rounds 1

No network and no disk: the messages are there, and nobody takes the windows. Beside it, in turn, the same by
a pass over each window for each rank that has some of it, which is what one writes first.
"""

import argparse
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch

from bench.kernels import machine
from bench.kernels.results import RESULTS
from bench.throughput.report import write
from fastjepa.engine.checkpoints.host import Cut, plan_files
from fastjepa.engine.checkpoints.plan import Batch, FilePlan, batches_of, in_turn
from fastjepa.engine.checkpoints.saver import put_together
from fastjepa.engine.partitions import Slice

FILES = ("student", "target", "exp_avg", "exp_avg_sq")
WIDTH, DEPTH, HIDDEN = 1408, 40, 6144  # of ViT-g/16


def shapes() -> dict[str, torch.Size]:
    """Of an encoder like ViT-g/16, 1.01e9 elements."""
    block = {
        "attn.proj": (WIDTH, WIDTH), "attn.qkv": (3 * WIDTH, WIDTH), "mlp.fc1": (HIDDEN, WIDTH),
        "mlp.fc2": (WIDTH, HIDDEN), "norm1": (WIDTH,), "norm2": (WIDTH,),
    }  # fmt: skip
    found = {"patch_embed.weight": torch.Size((WIDTH, 3 * 14 * 14)), "patch_embed.bias": torch.Size((WIDTH,))}
    for i in range(DEPTH):
        for name, shape in block.items():
            found[f"blocks.{i}.{name}.weight"] = torch.Size(shape)
            found[f"blocks.{i}.{name}.bias"] = torch.Size(shape[:1])
    return found


def cut_at_stage_3(ranks: int) -> list[Cut]:
    """As ZeRO 3 cuts: of each parameter an equal part for each rank."""
    every: list[Cut] = []
    for rank in range(ranks):
        slices, at = [], 0
        for name, shape in shapes().items():
            part = -(-shape.numel() // ranks)
            count = min(part, shape.numel() - rank * part)
            if count > 0:
                slices.append(Slice(name, shape, rank * part, at, count))
            at += part
        every.append({file: [tuple(slices)] for file in FILES})
    return every


def put_all_together(batches: Sequence[Batch], own: Mapping[str, list[np.ndarray]]) -> None:
    for batch in batches:
        messages = {rank: np.empty(n, np.float32) for rank, n in batch.numel.items() if rank}
        deque(put_together(batch, messages, own), maxlen=0)


def count_for_each_rank(plans: Mapping[str, FilePlan]) -> int:
    """The messages of one for each rank and window, their sizes found by a pass for each."""
    count = 0
    for _, window in in_turn(plans):
        ranks = {piece.rank for piece in window} - {0}
        count += len({rank: sum(p.numel for p in window if p.rank == rank) for rank in ranks})
    return count


def seconds(do: Callable[[], object]) -> float:
    before = time.perf_counter()
    do()
    return time.perf_counter() - before


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.checkpoint_ranks", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--ranks", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    facts = machine.facts(torch.device("cpu")) | {"load_before": os.getloadavg()[0]}
    every = cut_at_stage_3(options.ranks)
    plan_s = seconds(lambda: list(batches_of(plan_files(every))))
    plans = plan_files(every)
    batches = list(batches_of(plans))
    last = every[0]["student"][0][-1]
    own = {file: [np.zeros(last.at + last.count, np.float32)] for file in FILES}
    ours, each = [], []
    for _ in range(options.rounds):
        ours.append(seconds(lambda: put_all_together(batches, own)))
        each.append(seconds(lambda: count_for_each_rank(plans)))
    found = {
        "ranks": options.ranks,
        "elements": sum(shape.numel() for shape in shapes().values()),
        "pieces": sum(len(window) for batch in batches for _, window in batch.windows),
        "messages": sum(len(batch.numel) - (0 in batch.numel) for batch in batches),
        "messages_of_one_window": count_for_each_rank(plans),
        "plan_s": plan_s,
        "save_s": median(ours),
        "pass_for_each_rank_s": median(each),
        "ratio": median(each) / median(ours),
    }
    path = options.results / "cpu" / f"checkpoint-ranks-{options.ranks}-{facts['date']}.json"
    content = facts | {"load_after": os.getloadavg()[0], "summary": found, "save_s": ours, "each_s": each}
    write(path, json.dumps(content, indent=1) + "\n")
    for name, value in found.items():
        print(f"{name:22} {value:.6g}")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

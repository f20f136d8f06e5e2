"""Run a training script, and note what each of its steps is given, before it is taken.

    python witness.py FOLDER train.py [arguments …]

Each process writes a file of its own into FOLDER, a line for each step: what was trained on is known from
outside, and from what the optimizer got, not from what the order of images should have been. A line is one
write, and is there before the step begins, so whatever a checkpoint holds has been noted, even after SIGKILL.

Beside FOLDER lie gates: a process stands before step N as long as there is a file `gate_N`.
"""

import json
import os
import runpy
import sys
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor


def watch(folder: Path) -> None:
    from fastjepa.engine import learner

    folder.mkdir(parents=True, exist_ok=True)
    notes = os.open(folder / f"{os.getpid()}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    step = learner.Learner.step

    def noted(self: Any, micro_batches: Iterable[Any], rates: Any) -> Any:
        micro_batches = list(micro_batches)
        line = {"step": micro_batches[0].step, "seen": [seen(batch) for batch in micro_batches]}
        os.write(notes, json.dumps(line).encode() + b"\n")
        gate = folder.parent / f"gate_{line['step']}"
        while gate.exists():
            time.sleep(0.002)
        return step(self, micro_batches, rates)

    learner.Learner.step = noted  # type: ignore[method-assign]


def seen(batch: Any) -> list[tuple[int, int, int, int]]:
    """(epoch, image, checksum of its pixels, checksum of its masks) for each image of a micro-batch."""
    masks = batch.masks
    ends = None if masks.cu_seqlens is None else masks.cu_seqlens.tolist()
    rows = []
    for row, image in enumerate(batch.image_index.tolist()):
        context = masks.context[row] if ends is None else masks.context[ends[row] : ends[row + 1]]
        mask = checksum(masks.targets[:, row], checksum(context))
        rows.append((batch.epoch, image, checksum(batch.images[row]), mask))
    return rows


def checksum(tensor: Tensor, start: int = 0) -> int:
    return zlib.crc32(tensor.contiguous().numpy().tobytes(), start)


if __name__ == "__main__":
    _, folder, *sys.argv = sys.argv
    watch(Path(folder))
    script = sys.argv[0]
    sys.path[0] = os.path.dirname(script)
    runpy.run_path(script, run_name="__main__")

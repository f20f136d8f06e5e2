"""Multi-block masks: the sampler of every batch, on the host."""

from typing import Any

import torch

from bench.kernels import published
from bench.kernels.case import DEFAULT
from bench.kernels.race import Race
from bench.kernels.session import Session, run
from fastjepa.masks import Masks, MultiBlockMasks

IMAGES, SIDE = 128, 14  # of each device in the published recipes


def problems(masks: Masks) -> str:
    """Why these are no masks as published; "" if they are."""
    context, targets = masks.context, masks.targets  # [B, K], [M, B, P]
    for name, index in (("context", context), ("targets", targets)):
        if not bool((index.diff(dim=-1) > 0).all()):
            return f"{name} does not ascend"
        row, column = index // SIDE, index % SIDE
        if not bool((index >= 0).all() and (row < SIDE - 1).all() and (column < SIDE - 1).all()):
            return f"{name} leaves the grid without its last row and column"
    if not 10 < context.shape[1] <= SIDE * SIDE or targets.shape[:2] != (4, len(context)):
        return f"shapes {list(context.shape)} and {list(targets.shape)}"
    return ""


def test_multiblock_masks(session: Session, benchmark: Any) -> None:
    sampler = MultiBlockMasks((SIDE, SIDE), "truncate")
    step = iter(range(1 << 30))  # every round draws other masks
    images = torch.arange(IMAGES)

    def ours() -> Masks:
        return sampler.sample(images, epoch=0, step=next(step))

    assert problems(ours()) == ""
    # Nothing here is bound by memory, and a large copy would empty the caches of what takes microseconds.
    race = Race(session.clock, copied_bytes=64)
    race.add(DEFAULT, "fastjepa", session.clock.watch([ours]))
    sample = session.clock.watch([lambda: published.sample_masks(IMAGES, SIDE)])
    race.add("published", "published", sample)
    benchmark.group = "multi-block masks"
    run(session, benchmark, race)
    size = f"truncate, grid {SIDE} x {SIDE}, {IMAGES} images"
    session.rows += race.rows("MultiBlockMasks", size, "sample", "int64", bytes_moved=0, peak_bytes={})

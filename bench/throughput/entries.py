"""The rows of the comparison, and how each is built."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from bench.reference import IJEPATrainer, MAETrainer, ReferenceIJEPA, ReferenceMAE
from bench.throughput import ours
from bench.throughput.setting import Inputs, Mode
from fastjepa.models import initialise

Step = Callable[[int], object]  # runs the step of this number, and may return before the device is done
MAE, IJEPA = "reference MAE", "published I-JEPA"  # what others are divided by


@dataclass(frozen=True)
class Entry:
    """A row.

    Attributes:
        build: makes a model and gives a function that runs a step of it.
        masks: which masks it sees.
        group: "main", or "switch" for a variant of fastjepa.
        compiles: by torch.compile, which takes long: such rows are built last.
        gpu_alone: it cannot be on a CPU.
        is_graph: its steps are replays of a CUDA graph.
    """

    name: str
    build: Callable[[Inputs], Step]
    masks: Mode | Literal["mae"]
    group: Literal["main", "switch"] = "main"
    compiles: bool = False
    gpu_alone: bool = False
    is_graph: bool = False


def reference_mae(inputs: Inputs, modern: bool) -> Step:
    setting = inputs.setting
    width, depth, heads = setting.decoder
    with torch.device(setting.device):
        model = ReferenceMAE(
            setting.shape(class_token=True),
            decoder_width=width,
            decoder_depth=depth,
            decoder_heads=heads,
            modern=modern,
        )
        initialise(model, "mae", torch.Generator(setting.device).manual_seed(0))
    trainer = MAETrainer(model, precision=setting.mae_precision, device=setting.device)
    images = inputs.normalised
    return lambda number: trainer.step(images[number % len(images)])


def reference_ijepa(inputs: Inputs, modern: bool) -> Step:
    setting = inputs.setting
    with torch.device(setting.device):
        model = ReferenceIJEPA(setting.shape(), *setting.predictor, modern=modern)
        for part in (model.encoder, model.predictor):
            initialise(part, "published", torch.Generator(setting.device).manual_seed(0))
    model.to(setting.device)
    model.update_target(0.0)
    trainer = IJEPATrainer(model, precision=setting.precision, device=setting.device)
    images, masks = inputs.normalised, inputs.masks("truncate")

    def step(number: int) -> object:
        now = masks[number % len(masks)]
        return trainer.step(images[number % len(images)], now.context, now.targets, ours.RATES.momentum)

    return step


def fastjepa(
    name: str,
    *overrides: str,
    masks: Mode | Literal["mae"] = "budget",
    group: Literal["main", "switch"] = "main",
) -> Entry:
    """A row of fastjepa with these overrides."""
    which = ("objective.name=mae",) if masks == "mae" else (f"masks.mode={masks}",)
    return Entry(
        name,
        partial(ours.steps_of, (*which, *overrides)),
        masks,
        group,
        compiles="speed.compile=true" in overrides,
        gpu_alone=not ours.GPU_ALONE.isdisjoint(overrides),
        is_graph=not {"speed.cuda_graph=step", "speed.cuda_graph=auto"}.isdisjoint(overrides),
    )


def entries() -> list[Entry]:
    """All rows: first what is compared, then each switch alone, then all together."""
    plain, quick = ours.PLAIN, ours.QUICKEST
    fp8 = ours.SWITCHES["target_precision=fp8"]
    return [
        Entry(MAE, partial(reference_mae, modern=False), "mae"),
        Entry(IJEPA, partial(reference_ijepa, modern=False), "truncate"),
        fastjepa("fastjepa I-JEPA, truncate", *quick, masks="truncate"),
        fastjepa("fastjepa I-JEPA, truncate, fp8", *quick, *fp8, masks="truncate"),
        fastjepa("fastjepa I-JEPA, budget", *quick),
        fastjepa("fastjepa I-JEPA, packed", *quick, masks="packed"),
        fastjepa("fastjepa MAE", *quick, masks="mae"),
        fastjepa("fastjepa I-JEPA, budget, fp8", *quick, *fp8),
        fastjepa("plain", *plain, group="switch"),
        *(fastjepa(f"plain + {name}", *plain, *on, group="switch") for name, on in ours.SWITCHES.items()),
        fastjepa("all but the graph", *quick[:-1], "speed.cuda_graph=none", group="switch"),
        fastjepa("all together", *quick, *ours.SWITCHES["target_stream"], *fp8, group="switch"),
        Entry("modernised MAE", partial(reference_mae, modern=True), "mae", compiles=True),
        Entry("modernised I-JEPA", partial(reference_ijepa, modern=True), "truncate", compiles=True),
    ]


def chosen(names: Sequence[str]) -> list[Entry]:
    """Those whose group or name is named, in the order in which they are to be built.

    Raises:
        ValueError: a name is that of no row and no group.
    """
    every = entries()
    known = {entry.name for entry in every} | {"main", "switch", "all"}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no such row: {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    kept = [e for e in every if "all" in names or e.group in names or e.name in names]
    return sorted(kept, key=lambda entry: entry.compiles)

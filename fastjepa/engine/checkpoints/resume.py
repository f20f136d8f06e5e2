"""What a run may go on from: a checkpoint of the same model, and unless forced of the same settings."""

from collections.abc import Mapping
from dataclasses import dataclass

from fastjepa.config import Config, ConfigError, differences, parse_config
from fastjepa.engine.checkpoints.checkpoint import Checkpoint, CheckpointError, Position
from fastjepa.engine.checkpoints.plan import Shapes

_NAMED = 8  # differing tensors in a message


@dataclass(frozen=True)
class Obstacle:
    """Why a run would not go on as if it had never stopped.

    Attributes:
        what: said of the checkpoint.
        remedy: what to do about it.
        listing: of single values, each on a line of its own.
    """

    what: str
    remedy: str
    listing: str = ""


def obstacles(checkpoint: Checkpoint, start: Position, config: Config) -> list[Obstacle]:
    """What differs between a checkpoint and the run that would go on from it, where it changes results.

    Args:
        checkpoint: the newest good one of the run's folder.
        start: where a fresh run of the configuration, on these images and ranks, begins.
        config: what the run is asked to be now.
    """
    there, found = checkpoint.position, []
    changed: list[str] = []
    try:
        changed = differences(parse_config(checkpoint.config).results_part(), config.results_part())
    except ConfigError as error:
        what = f"has settings that this version cannot read ({error})"
        found.append(Obstacle(what, f"use the {checkpoint.writer} that wrote it"))
    if changed:
        listing = "".join(f"\n  {line}" for line in changed)
        found.append(Obstacle("is of other settings (there -> here)", "use those", listing))
    if there.dataset_images != start.dataset_images:
        what = (
            f"was trained on a set of {there.dataset_images} images, here are {start.dataset_images}: "
            "the order of images would change"
        )
        found.append(Obstacle(what, "give data.root the same images"))
    elif 0 < there.dataset_checksum != start.dataset_checksum > 0:
        what = (
            f"was trained on {there.dataset_images} images of other names: the order of images would change"
        )
        found.append(Obstacle(what, "give data.root the same images"))
    truncates = config.masks.mode == "truncate" and config.objective.name == "jepa"
    if there.micro_batch != start.micro_batch and truncates:
        what = (
            f"was trained on micro-batches of {there.micro_batch} images, here they have "
            f"{start.micro_batch}, and masks.mode truncate cuts contexts to the shortest in each"
        )
        found.append(Obstacle(what, f"set speed.accumulation to make them {there.micro_batch} again"))
    return found


def check_continues(checkpoint: Checkpoint, start: Position, config: Config) -> list[str]:
    """See that a run would go on from `checkpoint` as if it had never stopped; arguments as of `obstacles`.

    Returns:
        With run.resume force, what it would go on in spite of.

    Raises:
        CheckpointError: otherwise, if settings that change results differ, or the images or micro-batches.
    """
    found, path = obstacles(checkpoint, start, config), checkpoint.path
    if found and config.run.resume != "force":
        first = found[0]
        raise CheckpointError(
            f"{path} {first.what}: {first.remedy}, start in another run.dir with run.init_from={path}, or go "
            f"on all the same with run.resume=force{first.listing}"
        )
    return [f"going on all the same, for run.resume is force: {path} {o.what}{o.listing}" for o in found]


def check_fits(checkpoint: Checkpoint, wanted: Mapping[str, Shapes]) -> None:
    """See that a checkpoint has the tensors of a model, no more and no less.

    Args:
        checkpoint: to be loaded.
        wanted: shapes by file and by name.

    Raises:
        CheckpointError: what differs is named.
    """
    files = checkpoint.tensors
    lines = [f"no {file}.safetensors" for file in sorted(wanted.keys() - files.keys())]
    lines += [
        f"{file}.safetensors, which this model has no use for"
        for file in sorted(files.keys() - wanted.keys())
    ]
    # The weights first: the other files only repeat what differs in them.
    for file in sorted(wanted.keys() & files.keys(), key=lambda file: (file != "student", file)):
        there, here = files[file].shapes, wanted[file]
        lines += [f"{file}: no tensor {name}" for name in sorted(here.keys() - there.keys())]
        lines += [f"{file}: {name}, which this model has not" for name in sorted(there.keys() - here.keys())]
        lines += [
            f"{file}: {name} is {list(there[name])}, this model has {list(here[name])}"
            for name in sorted(here.keys() & there.keys())
            if tuple(there[name]) != tuple(here[name])
        ]
    if lines:
        more = f"\n  and {len(lines) - _NAMED} more" if len(lines) > _NAMED else ""
        listing = "".join(f"\n  {line}" for line in lines[:_NAMED])
        raise CheckpointError(
            f"{checkpoint.path} is of another model: use the model and objective settings of its state.json, "
            f"or another run.dir:{listing}{more}"
        )

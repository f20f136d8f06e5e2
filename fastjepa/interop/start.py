"""Continued pretraining: initial weights from a checkpoint, a run or a published file."""

from pathlib import Path

from fastjepa.config import ConfigError
from fastjepa.engine.checkpoint import (
    STATE,
    CheckpointError,
    load_checkpoint,
    newest_good,
    verify_checkpoint,
)
from fastjepa.interop.official import load_strict
from fastjepa.interop.published import State, read_published
from fastjepa.objectives import JEPA, MAE


def load_initial_weights(model: JEPA | MAE, source: str) -> None:
    """Fill `model` from `source`: a checkpoint directory, a run folder, or a published I-JEPA or MAE file.

    The optimizer and the schedules start afresh.

    Raises:
        ConfigError: there is nothing of that kind, or it is of another architecture; what differs is named.
    """
    path = Path(source)
    try:
        states = _from_directory(path) if path.is_dir() else _from_file(path)
        wanted = (
            ["encoder", "predictor", "target_encoder"] if isinstance(model, JEPA) else ["encoder", "decoder"]
        )
        missing = [name for name in wanted if name not in states]
        if missing:
            raise ValueError(f"it has no {' and no '.join(missing)}: was it trained with another objective?")
        for name in wanted:
            network = getattr(model, name)
            # Position tables are computed; our own checkpoints do not hold them.
            tables = dict(network.named_buffers())
            load_strict(network, tables | states[name], name)
    except (ValueError, CheckpointError) as error:
        raise ConfigError(f"run.init_from {source}: {error}") from error


def _from_directory(path: Path) -> dict[str, State]:
    if (path / STATE).exists():
        verify_checkpoint(path)
        found = path
    else:
        newest, damaged = newest_good(path / "checkpoints")
        if newest is None:
            raise ValueError("; ".join(damaged) or "there is no checkpoint in this directory")
        found = newest
    tensors = load_checkpoint(found).tensors
    states: dict[str, State] = {}
    for name, tensor in tensors["student"].items():
        network, _, inner = name.partition(".")
        states.setdefault(network, {})[inner] = tensor
    if "target" in tensors:
        states["target_encoder"] = {
            name.removeprefix("encoder."): tensor for name, tensor in tensors["target"].items()
        }
    return states


def _from_file(path: Path) -> dict[str, State]:
    states = read_published(path).states
    if "model" not in states:
        return states
    whole = states["model"]
    decoder = {k: v for k, v in whole.items() if k.startswith("decoder_") or k == "mask_token"}
    return {"encoder": {k: v for k, v in whole.items() if k not in decoder}, "decoder": decoder}

"""Continued pretraining: initial weights from a checkpoint, a run or a published file."""

import logging
from pathlib import Path
from typing import cast

from fastjepa.config import Config, ConfigError, parse_config
from fastjepa.engine.build import build_heads, build_model
from fastjepa.engine.checkpoints.checkpoint import STATE, Checkpoint, CheckpointError, load_checkpoint
from fastjepa.engine.checkpoints.verify import newest_good, verify_checkpoint
from fastjepa.interop.official import load_official, load_strict
from fastjepa.interop.published import Published, State, read_published
from fastjepa.models import HEADS_OF_WIDTH
from fastjepa.models.block import Block
from fastjepa.objectives import JEPA, MAE

_log = logging.getLogger(__name__)


def load_initial_weights(model: JEPA | MAE, source: str) -> None:
    """Fill `model` from `source`: a checkpoint directory, a run folder, or a published I-JEPA or MAE file.

    The optimizer and the schedules start afresh.

    Raises:
        ConfigError: there is nothing of that kind, or it is of another architecture; what differs is named.
    """
    path = Path(source)
    try:
        if path.is_dir():
            checkpoint = load_checkpoint(find_checkpoint(path))
            _check_heads(model, build_heads(_config_of(checkpoint)))
            states = _states_of(checkpoint)
        else:
            published = read_published(path)
            states = _states_of_file(published)
            # Tensors do not show heads; where the file does not, a published width has its published number.
            shape, told = model.encoder.shape, published.heads
            heads = {"encoder": told.get("heads", HEADS_OF_WIDTH.get(shape.width, shape.heads))}
            if "predictor_heads" in told:
                heads["predictor"] = told["predictor_heads"]
            _check_heads(model, heads)
        _load(model, states)
    except (ValueError, CheckpointError) as error:
        raise ConfigError(f"run.init_from {source}: {error}") from error


def load_trained(source: Path, heads: tuple[int, ...] = ()) -> tuple[JEPA | MAE, Path]:
    """The model of a checkpoint directory, of a run folder or of a published file, in fp32 on the CPU.

    Args:
        source: of them.
        heads: of a published file, where neither it nor its width tells them: those of the encoder, and where
            they are others of the predictor or decoder.

    Returns:
        The model, and the path of the checkpoint or file that it came from.

    Raises:
        CheckpointError: there is no good checkpoint there.
        ConfigError: its configuration is of a version that this one does not understand, or the file is not
            of a published layout.
    """
    if source.is_file():
        try:
            first, other = (*heads, None, None)[:2]
            return load_official(source, first, predictor_heads=other, decoder_heads=other), source
        except ValueError as error:
            raise ConfigError(str(error)) from error
    if heads:
        raise ConfigError(f"{source} tells its heads itself: leave --heads out")
    checkpoint = load_checkpoint(find_checkpoint(source))
    model = build_model(_config_of(checkpoint))
    _load(model, _states_of(checkpoint))
    return model, checkpoint.path


def _config_of(checkpoint: Checkpoint) -> Config:
    try:
        return parse_config(checkpoint.config)
    except ConfigError as error:
        raise ConfigError(
            f"{checkpoint.path} has settings that this version cannot read ({error}): use the "
            f"{checkpoint.writer} that wrote it"
        ) from error


def find_checkpoint(path: Path) -> Path:
    """A checkpoint directory itself, verified, or the newest good one of a run folder.

    Raises:
        CheckpointError: it is damaged, or there is none.
    """
    if (path / STATE).exists():
        verify_checkpoint(path)
        return path
    newest, damaged = newest_good(path / "checkpoints")
    if newest is None:
        raise CheckpointError("; ".join(damaged) or f"{path} is no checkpoint, and no run folder with one")
    for what in damaged:
        _log.warning("%s; taking %s instead", what, newest.name)
    return newest


def _load(model: JEPA | MAE, states: dict[str, State]) -> None:
    wanted = ["encoder", "predictor", "target_encoder"] if isinstance(model, JEPA) else ["encoder", "decoder"]
    missing = [name for name in wanted if name not in states]
    if missing:
        raise ValueError(f"it has no {' and no '.join(missing)}: was it trained with another objective?")
    for name in wanted:
        network = getattr(model, name)
        # Position tables are computed, for an image size that may be another.
        tables = dict(network.named_buffers())
        load_strict(network, states[name] | tables, name)


def _check_heads(model: JEPA | MAE, theirs: dict[str, int]) -> None:
    """Shapes fit whatever the heads are, but the weights then mean something else."""
    head = model.predictor.predictor_blocks if isinstance(model, JEPA) else None
    ours = {"encoder": model.encoder.shape.heads}
    if head is not None:
        ours["predictor"] = cast(Block, head[0]).attn.heads
    for name, heads in theirs.items():
        if name in ours and ours[name] != heads:
            setting = "model.heads" if name == "encoder" else f"model.{name}_heads"
            raise ValueError(f"its {name} has {heads} heads, this one {ours[name]}: set {setting} alike")


def _states_of(checkpoint: Checkpoint) -> dict[str, State]:
    """The state dicts of the networks in a checkpoint of our own."""
    states: dict[str, State] = {}
    for name, tensor in checkpoint.tensors["student"].items():
        network, _, inner = name.partition(".")
        states.setdefault(network, {})[inner] = tensor
    if "target" in checkpoint.tensors:
        states["target_encoder"] = {
            name.removeprefix("encoder."): tensor for name, tensor in checkpoint.tensors["target"].items()
        }
    return states


def _states_of_file(published: Published) -> dict[str, State]:
    states = published.states
    if "model" not in states:
        return states
    whole = states["model"]
    decoder = {k: v for k, v in whole.items() if k.startswith("decoder_") or k == "mask_token"}
    return {"encoder": {k: v for k, v in whole.items() if k not in decoder}, "decoder": decoder}

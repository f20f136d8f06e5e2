"""What is probed: encoders of a run or a file, and baselines beside them."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fastjepa.config import Config, ConfigError, parse_config
from fastjepa.engine.build import build_model
from fastjepa.engine.checkpoints.checkpoint import CheckpointError, load_checkpoint
from fastjepa.evaluation.layers import last_blocks
from fastjepa.interop import load_official
from fastjepa.interop.start import find_checkpoint, load_trained
from fastjepa.models import VisionTransformer, initialise
from fastjepa.objectives import JEPA, MAE
from fastjepa.probe import ENCODERS

PIXELS, UNTRAINED = "raw pixels", "random initialisation"


class ProbeError(ValueError):
    """A probe that cannot be made; the message says what came, what is allowed and what to do."""


@dataclass(frozen=True)
class Subject:
    """An encoder, as far as the protocols know it.

    Attributes:
        name: of its row.
        blocks: uint8 images [B, C, size, size] on the device -> patch tokens [B, N, D] of each of the last
            blocks that were asked for, normalised, the last block last.
        size: pixels of its views.
        channels: C.
        tokens: N.
        width: D.
        fingerprint: sha256 of its weights and of what else fixes its features.
    """

    name: str
    blocks: Callable[[Tensor], Sequence[Tensor]]
    size: int
    channels: int
    tokens: int
    width: int
    fingerprint: str


@dataclass(frozen=True)
class Trained:
    """What there is to probe.

    Attributes:
        model: in fp32 on the CPU.
        path: of the checkpoint or file.
        run: folder of its run; None for a file.
        config: of its run; None for a file.
        step: optimizer steps done; 0 for a file.
    """

    model: JEPA | MAE
    path: Path
    run: Path | None
    config: Config | None
    step: int


def open_trained(source: Path, heads: int | None = None) -> Trained:
    """A checkpoint directory, a run folder (its newest good checkpoint), or a published file.

    Args:
        source: where it is.
        heads: of the encoder of a file whose width was never published.

    Raises:
        ProbeError: there is nothing of that kind, or it is of another architecture than it says.
    """
    if source.is_file():
        try:
            return Trained(load_official(source, heads), source, None, None, 0)
        except ValueError as error:
            raise ProbeError(str(error).replace("give heads=", "give --heads")) from error
    try:
        path = find_checkpoint(source)
        checkpoint = load_checkpoint(path)
        model, _ = load_trained(path)
        config = parse_config(checkpoint.config)
    except (CheckpointError, ConfigError) as error:
        raise ProbeError(str(error)) from error
    except ValueError as error:
        raise ProbeError(
            f"{source} holds another architecture than it should: {error}; probe it with the fastjepa that "
            "wrote it, or give a checkpoint that it has not been mixed with"
        ) from error
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return Trained(model, path, run, config, checkpoint.position.step)


def default_encoders(trained: Trained) -> tuple[str, ...]:
    return ENCODERS if isinstance(trained.model, JEPA) else ("context",)


def subject_of(
    trained: Trained, encoder: str, blocks: int, device: torch.device, dtype: torch.dtype
) -> Subject:
    """The target or the context encoder of what was trained.

    Raises:
        ProbeError: it has no such encoder, fewer blocks, or no square images.
    """
    model = trained.model
    if encoder == "target" and not isinstance(model, JEPA):
        raise ProbeError(
            f"{trained.path} was trained with MAE, which has no target encoder: use --encoder context"
        )
    chosen = model.target_encoder if encoder == "target" and isinstance(model, JEPA) else model.encoder
    return encoder_subject(f"{encoder} encoder", chosen, blocks, device, dtype)


def untrained_subject(trained: Trained, blocks: int, device: torch.device, dtype: torch.dtype) -> Subject:
    """The same encoder with the weights that training began with, or, of a file, published initial ones."""
    if trained.config is not None:
        encoder = build_model(trained.config).encoder
    else:
        like = trained.model.encoder
        encoder = VisionTransformer(like.shape, like.pixel_mean, like.pixel_std)
        scheme = "published" if isinstance(trained.model, JEPA) else "mae"
        initialise(encoder, scheme, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    return encoder_subject(UNTRAINED, encoder, blocks, device, dtype)


def encoder_subject(
    name: str, encoder: VisionTransformer, blocks: int, device: torch.device, dtype: torch.dtype
) -> Subject:
    """One of our own encoders.

    Raises:
        ProbeError: it has fewer blocks, or no square images.
    """
    shape = encoder.shape
    check_depth(name, shape.depth, blocks)
    height, width = shape.image_size
    if height != width:
        raise ProbeError(
            f"the {name} takes images of {height} x {width} pixels; only square views are probed"
        )
    fingerprint = fingerprint_of(encoder, f"{shape} {encoder.pixel_mean} {encoder.pixel_std}")
    encoder = encoder.eval().requires_grad_(False).to(device, dtype)
    return Subject(
        name,
        partial(_blocks_of, encoder, blocks),
        height,
        shape.channels,
        shape.grid[0] * shape.grid[1],
        shape.width,
        fingerprint,
    )


def _blocks_of(encoder: VisionTransformer, blocks: int, images: Tensor) -> list[Tensor]:
    return last_blocks(encoder, images, blocks)


def check_depth(name: str, depth: int, blocks: int) -> None:
    if blocks > depth:
        raise ProbeError(
            f"the last {blocks} blocks are asked for, and the {name} has {depth}: use --blocks {depth}, or "
            "--blocks 1 for the last block alone"
        )


def fingerprint_of(network: nn.Module, more: str) -> str:
    """sha256 over every tensor of a network by name, and over `more`."""
    digest = hashlib.sha256(more.encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()

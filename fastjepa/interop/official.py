"""The published checkpoint layouts of I-JEPA (``.pth.tar``) and MAE (``{"model": state_dict}``)."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastjepa.interop.published import HEADS, PREFIX, State, fresh_extras, read_published
from fastjepa.models import HEADS_OF_WIDTH, MAEDecoder, Predictor, VisionTransformer, ViTShape
from fastjepa.models.block import Block
from fastjepa.models.positions import sincos_2d
from fastjepa.objectives import JEPA, MAE

DECODER_HEADS_OF_WIDTH = {512: 16}  # arXiv:2111.06377
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def load_official(
    path: str | os.PathLike[str],
    heads: int | None = None,
    predictor_heads: int | None = None,
    decoder_heads: int | None = None,
) -> JEPA | MAE:
    """A model from a published checkpoint; its architecture is read off the tensors.

    Args:
        path: of an I-JEPA checkpoint (a dictionary of encoder, predictor, target_encoder) or an MAE one
            (``{"model": …}``, with or without the decoder).
        heads: of the encoder; tensors do not show it, so by default it comes from the file, where
            `save_official` wrote it into one, and else from the table of published widths.
        predictor_heads: by default the file's, and else the encoder's, as published.
        decoder_heads: of MAE's decoder; by default the file's, and else 16 for the published width 512.

    Returns:
        A `JEPA` or an `MAE` in fp32 on the CPU.

    Raises:
        ValueError: another layout, a missing, extra or misshapen tensor, a width without known heads, or a
            file that holds anything but tensors and plain values.
    """
    checkpoint = read_published(Path(path))
    told = checkpoint.heads
    heads = told.get("heads") if heads is None else heads
    predictor_heads = told.get("predictor_heads") if predictor_heads is None else predictor_heads
    decoder_heads = told.get("decoder_heads") if decoder_heads is None else decoder_heads
    if "model" in checkpoint.states:
        return _build_mae(checkpoint.states["model"], heads, decoder_heads)
    jepa = _build_jepa(checkpoint.states, heads, predictor_heads)
    jepa.published_extras = checkpoint.extras
    return jepa


def save_official(model: JEPA | MAE, path: str | os.PathLike[str]) -> None:
    """Write `model` in the published layout, in fp32; what was loaded comes back bit by bit.

    A file of that name is replaced whole or, if writing fails, not at all.

    An I-JEPA file also gets the optimizer state, epoch and so on that the model was loaded with, or fresh
    ones that the published loader accepts. Heads other than published are told in an entry that is ours.
    """
    if isinstance(model, MAE):
        parts = dict(model.encoder.state_dict())
        if model.decoder is not None:
            parts |= model.decoder.state_dict()
        content: dict[str, Any] = {"model": _fp32(parts)}
    else:
        content = {
            name: _fp32(getattr(model, name).state_dict(), prefix=PREFIX)
            for name in ("encoder", "predictor", "target_encoder")
        }
        content |= fresh_extras(model) | (model.published_extras or {})
    if (heads := heads_of(model)) != _published_heads(model):
        content[HEADS] = heads
    target = Path(path)
    partial = target.with_name(target.name + ".tmp")
    try:
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def heads_of(model: JEPA | MAE) -> dict[str, int]:
    """The attention heads of each network, as `load_official` takes them; tensors do not show them."""
    heads = {"heads": model.encoder.shape.heads}
    if isinstance(model, JEPA):
        heads["predictor_heads"] = cast(Block, model.predictor.predictor_blocks[0]).attn.heads
    elif model.decoder is not None:
        heads["decoder_heads"] = cast(Block, model.decoder.decoder_blocks[0]).attn.heads
    return heads


def _published_heads(model: JEPA | MAE) -> dict[str, int | None]:
    """What `load_official` takes them for where nobody says."""
    heads = {"heads": HEADS_OF_WIDTH.get(model.encoder.shape.width)}
    if isinstance(model, JEPA):
        heads["predictor_heads"] = heads["heads"]
    elif model.decoder is not None:
        heads["decoder_heads"] = DECODER_HEADS_OF_WIDTH.get(model.decoder.decoder_embed.out_features)
    return heads


def _fp32(state: Mapping[str, Tensor], prefix: str = "") -> State:
    # Copies: a weight may be a view of a flat buffer, and all of that buffer would be written.
    return {
        prefix + name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, tensor in state.items()
    }


def _build_jepa(states: Mapping[str, State], heads: int | None, predictor_heads: int | None) -> JEPA:
    encoder = states["encoder"]
    shape = _encoder_shape(encoder, heads)
    predictor = states["predictor"]
    width = _tensor(predictor, "predictor_embed.weight", 2).shape[0]
    chosen = shape.heads if predictor_heads is None else predictor_heads
    _check_heads("predictor_heads", width, chosen)
    jepa = JEPA(
        _encoder(shape),
        Predictor(shape.grid, shape.width, width, _depth(predictor, "predictor_blocks."), chosen),
    )
    for name in ("encoder", "predictor", "target_encoder"):
        load_strict(getattr(jepa, name), states[name], name)
    return jepa


def _build_mae(state: State, heads: int | None, decoder_heads: int | None) -> MAE:
    decoder_state = {k: v for k, v in state.items() if k.startswith("decoder_") or k == "mask_token"}
    encoder_state = {k: v for k, v in state.items() if k not in decoder_state}
    shape = _encoder_shape(encoder_state, heads)
    encoder = _encoder(shape)
    load_strict(encoder, encoder_state, "model")
    if not decoder_state:
        return MAE(encoder, None)
    width = _tensor(decoder_state, "decoder_embed.weight", 2).shape[0]
    chosen = DECODER_HEADS_OF_WIDTH.get(width) if decoder_heads is None else decoder_heads
    if chosen is None:
        raise ValueError(
            f"the heads of a decoder of width {width} are not known: give decoder_heads=, or --heads N,M"
        )
    _check_heads("decoder_heads", width, chosen)
    decoder = MAEDecoder(shape, width, _depth(decoder_state, "decoder_blocks."), chosen)
    load_strict(decoder, decoder_state, "model")
    return MAE(encoder, decoder)


def _encoder(shape: ViTShape) -> VisionTransformer:
    if shape.channels == 3:
        return VisionTransformer(shape, *IMAGENET)
    return VisionTransformer(shape, (0.0,) * shape.channels, (1.0,) * shape.channels)


def _encoder_shape(state: State, heads: int | None) -> ViTShape:
    width, channels, patch_size, _ = _tensor(state, "patch_embed.proj.weight", 4).shape  # [D, C, p, p]
    if heads is None and width not in HEADS_OF_WIDTH:
        known = ", ".join(f"{w} ({h} heads)" for w, h in HEADS_OF_WIDTH.items())
        raise ValueError(
            f"the heads of an encoder of width {width} are not known: give heads=, or --heads. Known: {known}"
        )
    chosen = HEADS_OF_WIDTH[width] if heads is None else heads
    _check_heads("heads", width, chosen)
    class_token = "cls_token" in state
    rows, columns = _grid(_tensor(state, "pos_embed", 3), class_token)
    return ViTShape(
        image_size=(rows * patch_size, columns * patch_size),
        patch_size=patch_size,
        width=width,
        depth=_depth(state, "blocks."),
        heads=chosen,
        mlp_ratio=_tensor(state, "blocks.0.mlp.fc1.weight", 2).shape[0] / width,
        channels=channels,
        class_token=class_token,
    )


def _grid(positions: Tensor, class_token: bool) -> tuple[int, int]:
    """The grid that the position table [1, N, D] is of: square, unless its values say otherwise."""
    patches = positions.shape[1] - class_token
    side = math.isqrt(patches)
    grids = [(rows, patches // rows) for rows in range(1, patches + 1) if patches % rows == 0]
    for grid in sorted(grids, key=lambda grid: abs(grid[0] - grid[1])):
        table = sincos_2d(grid, positions.shape[2], class_token)
        if table.shape == positions.shape and torch.allclose(table, positions.float(), atol=1e-4):
            return grid
    if side * side == patches:
        return side, side
    raise ValueError(
        f"pos_embed has {patches} patches, which is no square and no sine-cosine table of a grid"
    )


def _depth(state: State, prefix: str) -> int:
    return len({name.split(".")[1] for name in state if name.startswith(prefix)})


def _tensor(state: State, name: str, dimensions: int) -> Tensor:
    if name not in state:
        raise ValueError(
            f"tensor {name} is missing: this is no I-JEPA or MAE checkpoint, or an incomplete one"
        )
    if state[name].ndim != dimensions:
        raise ValueError(
            f"tensor {name} is {list(state[name].shape)} and should have {dimensions} dimensions"
        )
    return state[name]


def _check_heads(name: str, width: int, heads: int) -> None:
    if heads < 1 or width % heads or (width // heads) % 8:
        allowed = [h for h in range(1, width // 8 + 1) if width % h == 0 and width // h % 8 == 0]
        raise ValueError(f"{name} is {heads}, which does not fit a width of {width}; allowed: {allowed}")


def load_strict(module: nn.Module, state: State, where: str) -> None:
    """Copy every tensor of `state` into `module`.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape; it is named.
    """
    own = module.state_dict()
    problems = [f"{name} is missing" for name in own.keys() - state.keys()]
    problems += [f"{name} is unexpected" for name in state.keys() - own.keys()]
    problems += [
        f"{name} is {list(state[name].shape)} and should be {list(own[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:6]) + (
            f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        )
        raise ValueError(f"the tensors of {where} do not fit: {shown}")
    module.load_state_dict(state)

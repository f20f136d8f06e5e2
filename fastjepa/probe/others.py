"""Other people's encoders as baselines: timm's and Hugging Face's, imported only when one is asked for."""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastjepa.models.vit import IMAGENET_MEAN, IMAGENET_STD
from fastjepa.probe.subjects import ProbeError, Subject, check_depth, fingerprint_of

_FORMS = "timm:NAME, timm:NAME=FILE.safetensors, hf:NAME or hf:FOLDER"

_log = logging.getLogger(__name__)


def other_subject(given: str, blocks: int, device: torch.device, dtype: torch.dtype) -> Subject:
    """The encoder that `--baseline` names, with its own image size and normalisation.

    Raises:
        ProbeError: an unknown form, a name or weights that are not there, no patch tokens, too few blocks.
        ModuleNotFoundError: timm or transformers is not installed.
    """
    kind, _, name = given.partition(":")
    if kind not in ("timm", "hf") or not name:
        raise ProbeError(f"--baseline {given!r} is none of {_FORMS}")
    make = _of_timm if kind == "timm" else _of_transformers
    return make(given, name, blocks, device, dtype)


def _of_timm(given: str, name: str, blocks: int, device: torch.device, dtype: torch.dtype) -> Subject:
    timm = _imported("timm", given)
    name, _, file = name.partition("=")
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('.')[0][:12]}*")[:3]
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise ProbeError(f"timm has no model {name}{hint}")
    if file and (not file.endswith(".safetensors") or not Path(file).is_file()):
        raise ProbeError(f"{given}: {file} is no .safetensors file, and nothing else is read: give one")
    try:
        model = timm.create_model(name, pretrained=not file, num_classes=0)
        if file:
            _load_whole(model, file, model.pretrained_cfg.get("classifier") or "head")
    except Exception as error:  # of the hub, of the network, of a file that does not fit
        raise ProbeError(_not_at_hand(given, error, f"timm:{name}=FILE.safetensors")) from error
    if not hasattr(model, "blocks") or not hasattr(model, "forward_intermediates"):
        raise ProbeError(f"{given} has no transformer blocks, and so no patch tokens: name a ViT of timm")
    check_depth(given, len(model.blocks), blocks)
    cfg = model.pretrained_cfg
    channels, size, _ = cfg["input_size"]

    def last(images: Tensor) -> Sequence[Tensor]:
        found: list[Tensor] = model.forward_intermediates(
            images, indices=blocks, norm=True, output_fmt="NLC", intermediates_only=True
        )
        return found

    return _subject(given, model, last, size, channels, (cfg["mean"], cfg["std"]), device, dtype)


def _of_transformers(given: str, name: str, blocks: int, device: torch.device, dtype: torch.dtype) -> Subject:
    transformers = _imported("transformers", given)
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise ProbeError(f"{given}: there is no folder {name}; give one that save_pretrained wrote")
    name = str(Path(name).expanduser()) if name.startswith("~") else name
    try:
        model, report = transformers.AutoModel.from_pretrained(
            name, use_safetensors=True, output_loading_info=True
        )
        # Such tensors would be drawn at random; a pooler is not used here.
        _check_none_missing(key for key in report["missing_keys"] if "pooler" not in key)
    except Exception as error:  # of the hub, of the network, of a folder that is not one
        raise ProbeError(_not_at_hand(given, error, "hf:FOLDER")) from error
    config = model.config
    model = getattr(model, "vision_model", model)  # of CLIP and its like
    config = getattr(config, "vision_config", config)
    wanted = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_channels")
    missing = [key for key in wanted if not isinstance(getattr(config, key, None), int)]
    if missing:
        raise ProbeError(
            f"{given} is no ViT of square images as far as its config says ({', '.join(missing)} missing): "
            "name one, such as ViT, DINOv2, I-JEPA or MAE"
        )
    check_depth(given, config.num_hidden_layers, blocks)
    if hasattr(config, "mask_ratio"):
        config.mask_ratio = 0.0  # an MAE would hide patches at random here too
    norm = next(
        (
            m
            for n in ("layernorm", "post_layernorm", "norm")
            if isinstance(m := getattr(model, n, None), nn.Module)
        ),
        nn.Identity(),
    )
    patches = (config.image_size // config.patch_size) ** 2

    def last(images: Tensor) -> Sequence[Tensor]:
        hidden = model(pixel_values=images, output_hidden_states=True).hidden_states
        return [norm(tokens[:, -patches:]) for tokens in hidden[-blocks:]]  # class and register tokens first

    pixels = _normalisation(transformers, given, name)
    return _subject(given, model, last, config.image_size, config.num_channels, pixels, device, dtype)


def _load_whole(model: nn.Module, file: str, classifier: str) -> None:
    """Every tensor of the model from a file; timm itself leaves those at random that are not in it."""
    from safetensors.torch import load_file

    found = model.load_state_dict(load_file(file), strict=False)
    _check_none_missing(found.missing_keys)
    odd = [key for key in found.unexpected_keys if not key.startswith(f"{classifier}.")]
    if odd:
        raise ValueError(f"it has {len(odd)} tensors that the model has not, {odd[0]} first")


def _check_none_missing(keys: Iterable[str]) -> None:
    missing = sorted(keys)
    if missing:
        raise ValueError(f"{len(missing)} tensors of the model are not in it, {missing[0]} first")


def _normalisation(transformers: Any, given: str, name: str) -> tuple[Sequence[float], Sequence[float]]:
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name)
        return processor.image_mean, processor.image_std
    except (OSError, ValueError, AttributeError, ImportError):
        _log.warning("%s says no mean and deviation of its pixels: ImageNet's are taken", given)
        return IMAGENET_MEAN, IMAGENET_STD


def _subject(
    name: str,
    model: nn.Module,
    last: Callable[[Tensor], Sequence[Tensor]],
    size: int,
    channels: int,
    pixels: tuple[Sequence[float], Sequence[float]],
    device: torch.device,
    dtype: torch.dtype,
) -> Subject:
    fingerprint = fingerprint_of(model, f"{name} {size} {pixels}")
    model.eval().requires_grad_(False).to(device, dtype)
    mean, std = (torch.tensor(value, device=device)[:channels, None, None] for value in pixels)  # [C, 1, 1]

    @torch.no_grad()
    def blocks(images: Tensor) -> Sequence[Tensor]:
        return last(((images.float() / 255 - mean) / std).to(dtype))

    tokens = blocks(torch.zeros(1, channels, size, size, dtype=torch.uint8, device=device))[-1]  # [1, N, D]
    return Subject(name, blocks, size, channels, tokens.shape[1], tokens.shape[2], fingerprint)


def _imported(module: str, given: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ProbeError(f"--baseline {given} needs {module}: pip install {module}") from error


def _not_at_hand(given: str, error: Exception, instead: str) -> str:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return (
        f"the weights of {given} are not at hand ({reason}). Where there is a network they are downloaded; "
        f"where there is none, copy them here and give --baseline {instead}, or set HF_HOME to a cache that "
        "has them"
    )

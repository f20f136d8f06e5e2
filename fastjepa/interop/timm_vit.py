"""Encoders as vision transformers of timm.

The final norm stands before the pooling, over all tokens, as in training. timm by itself moves it behind an
average pooling (`fc_norm`), where it would normalise something else. The average is over patches alone.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastjepa.interop.head import LinearHead
from fastjepa.interop.official import load_strict
from fastjepa.interop.portable import at_image_size, choose_encoder
from fastjepa.models import SIZES, VisionTransformer
from fastjepa.objectives import JEPA, MAE

# Of timm's own entries one for each width; every argument in which they differ is given.
NAMES = {
    SIZES["tiny"].width: "vit_tiny_patch16_224",
    SIZES["small"].width: "vit_small_patch16_224",
    SIZES["base"].width: "vit_base_patch16_224",
    SIZES["large"].width: "vit_large_patch16_224",
    SIZES["huge"].width: "vit_huge_patch14_224",
    SIZES["giant"].width: "vit_giant_patch14_224",
}


@dataclass(frozen=True)
class Recipe:
    """What `timm.create_model` is to be called with."""

    name: str
    arguments: dict[str, Any]
    pretrained_cfg: dict[str, Any]  # how images are prepared

    def call(self) -> str:
        """The call as a line of Python, of the model without its weights."""
        given = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f'timm.create_model("{self.name}", {given})'


def recipe_of(encoder: VisionTransformer, classes: int = 0) -> Recipe:
    """The recipe of an encoder.

    Args:
        encoder: whose shape it is.
        classes: of a linear head; 0 for none.
    """
    shape = encoder.shape
    arguments = {
        "img_size": shape.image_size,
        "patch_size": shape.patch_size,
        "in_chans": shape.channels,
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": shape.heads,
        "mlp_ratio": ratio_for(shape.width, round(shape.width * shape.mlp_ratio)),
        "class_token": shape.class_token,
        "global_pool": "avg",
        "fc_norm": False,
        "num_classes": classes,
    }
    prepared = {
        "input_size": (shape.channels, *shape.image_size),
        "mean": encoder.pixel_mean,
        "std": encoder.pixel_std,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center" if shape.image_size[0] == shape.image_size[1] else "squash",
        "num_classes": classes,
        # Of the entry's own weights, which these are not.
        "tag": "fastjepa",
        "url": "",
        "hf_hub_id": None,
        "license": None,
        "origin_url": None,
    }
    return Recipe(NAMES.get(shape.width, "vit_base_patch16_224"), arguments, prepared)


def ratio_for(width: int, hidden: int) -> float:
    """The `mlp_ratio` of which timm, that rounds width * mlp_ratio down, makes `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def to_timm(
    model: JEPA | MAE,
    encoder: str | None = "target",
    image_size: tuple[int, int] | None = None,
    head: LinearHead | None = None,
) -> Any:
    """An encoder as a model of timm, with weights of its own, in fp32 on the CPU.

    Args:
        model: what was trained.
        encoder: of a JEPA `target` or `context`; an MAE has but one.
        image_size: pixels: height, width; those of the training images by default. See `at_image_size`.
        head: becomes its classifier; without one, the model gives the mean of the patch tokens [B, D].

    Returns:
        A `timm.models.VisionTransformer`; `forward_features` gives the tokens, [B, N, D].

    Raises:
        ValueError: there is no such encoder, or the image size does not fit.
    """
    chosen = choose_encoder(model, None if isinstance(model, MAE) else encoder)
    return timm_of(at_image_size(chosen, image_size or chosen.shape.image_size), head)


def timm_of(encoder: VisionTransformer, head: LinearHead | None = None) -> Any:
    """As `to_timm`, of an encoder."""
    import timm

    recipe = recipe_of(encoder, 0 if head is None else len(head.weight))
    made = timm.create_model(recipe.name, **recipe.arguments, pretrained_cfg_overlay=recipe.pretrained_cfg)
    state = {name: tensor.detach() for name, tensor in encoder.state_dict().items()}
    if head is not None:
        state |= {"head.weight": head.weight, "head.bias": head.bias}
    load_strict(made, state, "the encoder, as one of timm")
    return made.eval()


def save_timm(encoder: VisionTransformer, head: LinearHead | None, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` into `folder`, as timm itself writes them."""
    from timm.models import save_for_hf

    named = {"label_names": list(head.names)} if head is not None else {}
    arguments = recipe_of(encoder, 0 if head is None else len(head.weight)).arguments
    made = timm_of(encoder, head)
    save_for_hf(made, str(folder), model_config=named, model_args=arguments, safe_serialization=True)


@torch.no_grad()
def run_timm(folder: Path, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """What timm makes of the folder: tokens [B, N, D], and logits [B, classes] of a classifier.

    Args:
        folder: as `save_timm` wrote it.
        images: uint8 [B, C, H, W], of the encoder's size.
    """
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    prepared = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(prepared[name]).view(-1, 1, 1) for name in ("mean", "std"))
    pixels = (images / 255 - mean) / std  # [B, C, H, W]
    tokens = model.forward_features(pixels)
    return tokens, model.forward_head(tokens) if model.num_classes else None

"""Encoders as models of Hugging Face transformers.

A JEPA's encoder is an `IJepaModel`: no class token, the final norm over all tokens. An MAE's is a `ViTModel`
without its pooling layer, for `ViTMAEModel` hides patches at random in every forward pass and so gives no
features of an image. An MAE with its decoder is in vit_mae.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastjepa.interop.head import LinearHead
from fastjepa.interop.official import load_strict
from fastjepa.interop.portable import at_image_size, choose_encoder
from fastjepa.models import VisionTransformer
from fastjepa.models.block import NORM_EPS
from fastjepa.objectives import JEPA, MAE

BICUBIC = 3  # as PIL numbers its filters


def to_transformers(
    model: JEPA | MAE,
    encoder: str | None = "target",
    image_size: tuple[int, int] | None = None,
    head: LinearHead | None = None,
) -> Any:
    """An encoder as a model of transformers, with weights of its own, in fp32 on the CPU.

    Args:
        model: what was trained.
        encoder: of a JEPA `target` or `context`; an MAE has but one.
        image_size: pixels: height, width; those of the training images by default. See `at_image_size`.
        head: gives an `IJepaForImageClassification`.

    Returns:
        An `IJepaModel`, `IJepaForImageClassification` or, of an MAE, `ViTModel`.

    Raises:
        ValueError: there is no such encoder, the image size does not fit, or transformers has no such model.
    """
    chosen = choose_encoder(model, None if isinstance(model, MAE) else encoder)
    return transformers_of(at_image_size(chosen, image_size or chosen.shape.image_size), head)


def transformers_of(encoder: VisionTransformer, head: LinearHead | None = None) -> Any:
    """As `to_transformers`, of an encoder."""
    from transformers import IJepaConfig, IJepaForImageClassification, IJepaModel, ViTConfig, ViTModel

    sizes, state = sizes_of(encoder), renamed_encoder(encoder)
    if encoder.shape.class_token:
        if head is not None:
            raise ValueError(
                "transformers has no classifier on the mean of a class-token encoder's patches, only one on "
                "the class token: leave the head out, or take the format timm, onnx or torch"
            )
        made = ViTModel(ViTConfig(**sizes), add_pooling_layer=False)
    elif head is None:
        made = IJepaModel(IJepaConfig(**sizes))
    else:
        names = dict(enumerate(head.names))
        labels = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
        made = IJepaForImageClassification(IJepaConfig(**sizes, **labels))
        state = {f"ijepa.{name}": tensor for name, tensor in state.items()}
        state |= {"classifier.weight": head.weight, "classifier.bias": head.bias}
    load_strict(made, state, type(made).__name__)
    return made.eval()


def sizes_of(encoder: VisionTransformer) -> dict[str, Any]:
    """What a ViT's configuration says of an encoder."""
    shape = encoder.shape
    return {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "intermediate_size": round(shape.width * shape.mlp_ratio),
        "layer_norm_eps": NORM_EPS,
        "image_size": shape.image_size[0] if shape.image_size[0] == shape.image_size[1] else shape.image_size,
        "patch_size": shape.patch_size,
        "num_channels": shape.channels,
    }


def image_processor(encoder: VisionTransformer) -> Any:
    """What turns images into the `pixel_values` of `encoder`.

    Of a square encoder it resizes the shorter side and crops the centre, as a run's probes see images; for
    another it resizes to the shape itself. Bicubic, with antialiasing. Three channels are made of grey,
    palette and CMYK images too; one channel has to be given.
    """
    # ViT's own processor refuses grey images, and before transformers 5 whatever is to be cropped.
    from transformers import BitImageProcessor

    height, width = encoder.shape.image_size
    whole = {"height": height, "width": width}
    crop = {"size": {"shortest_edge": height}, "do_center_crop": True, "crop_size": whole}
    return BitImageProcessor(
        do_convert_rgb=encoder.shape.channels == 3,
        resample=BICUBIC,
        image_mean=list(encoder.pixel_mean),
        image_std=list(encoder.pixel_std),
        **(crop if height == width else {"size": whole, "do_center_crop": False}),
    )


def save_transformers(encoder: VisionTransformer, head: LinearHead | None, folder: Path) -> None:
    """Write `config.json`, `model.safetensors` and `preprocessor_config.json` into `folder`."""
    with without_progress_bars():
        transformers_of(encoder, head).save_pretrained(folder)
        image_processor(encoder).save_pretrained(folder)


@torch.no_grad()
def run_transformers(folder: Path, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """What transformers makes of the folder: tokens [B, N, D], and logits [B, classes] of a classifier.

    Args:
        folder: as `save_transformers` wrote it.
        images: uint8 [B, C, H, W], of the encoder's size.
    """
    import transformers

    with without_progress_bars():
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        made = getattr(transformers, config.architectures[0])
        without = {"add_pooling_layer": False} if made is transformers.ViTModel else {}
        model = made.from_pretrained(folder, local_files_only=True, **without).eval()
        processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    pixels = processor(list(images), return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    if made is not transformers.IJepaForImageClassification:
        return model(pixels).last_hidden_state, None
    return model.ijepa(pixels).last_hidden_state, model(pixels).logits


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Files of this machine are read at once; a bar for each would bury what is said."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def renamed_encoder(encoder: VisionTransformer) -> dict[str, Tensor]:
    """The encoder's tensors under transformers' names; queries, keys and values apart."""
    own = {name: tensor.detach() for name, tensor in encoder.state_dict().items()}
    found = {
        "embeddings.position_embeddings": own["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": own["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": own["patch_embed.proj.bias"],
        "layernorm.weight": own["norm.weight"],
        "layernorm.bias": own["norm.bias"],
    }
    if encoder.shape.class_token:
        found["embeddings.cls_token"] = own["cls_token"]
    return found | renamed_blocks(own, "blocks", "layers")


def renamed_blocks(own: dict[str, Tensor], prefix: str, their_prefix: str) -> dict[str, Tensor]:
    """The tensors of a stack of blocks under transformers' names.

    Args:
        own: a state dict with the stack's tensors, named `PREFIX.NUMBER.…`.
        prefix, their_prefix: of the stack's name, here and there.
    """
    found: dict[str, Tensor] = {}
    depth = 1 + max(int(name.split(".")[1]) for name in own if name.startswith(f"{prefix}."))
    for number in range(depth):
        for kind in ("weight", "bias"):
            ours, theirs = f"{prefix}.{number}", f"{their_prefix}.{number}"
            parts = own[f"{ours}.attn.qkv.{kind}"].chunk(3)  # [D, D] or [D] each
            for part, tensor in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
                found[f"{theirs}.attention.{part}.{kind}"] = tensor
            for name, their_name in (
                ("norm1", "layernorm_before"),
                ("attn.proj", "attention.o_proj"),
                ("norm2", "layernorm_after"),
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
            ):
                found[f"{theirs}.{their_name}.{kind}"] = own[f"{ours}.{name}.{kind}"]
    return found

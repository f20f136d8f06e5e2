"""An MAE, encoder and decoder, as `ViTMAEForPreTraining` of Hugging Face transformers.

Pixels of a patch are in the same order there, the channel changing fastest, and of the same noise the same
patches are hidden. So the loss is the same number, and training can go on there.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastjepa.interop.huggingface import (
    image_processor,
    renamed_blocks,
    renamed_encoder,
    sizes_of,
    without_progress_bars,
)
from fastjepa.interop.loading import heads_of
from fastjepa.interop.official import load_strict
from fastjepa.models import MAEDecoder
from fastjepa.objectives import JEPA, MAE

BLOCKS, WRONG_BLOCKS = "decoder.decoder_layers.", "decoder.decoder_encoder.layer."

Painted = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of images: tokens [B, 1 + N, D] with nothing hidden; and, with what `noise_for` hides, the pixels
[B, N, p p C], the mask [B, N], 1 where a patch is hidden, and the loss."""


def decoder_of(model: JEPA | MAE) -> MAEDecoder:
    """The decoder of what `ViTMAEForPreTraining` can hold.

    Raises:
        ValueError: it is no MAE, has no decoder, or its images are not square.
    """
    if not isinstance(model, MAE):
        raise ValueError(
            "this is an I-JEPA, and ViTMAEForPreTraining is an MAE with its decoder: take format "
            "transformers, which makes an IJepaModel of an encoder"
        )
    if model.decoder is None:
        raise ValueError(
            "this is an encoder alone, and ViTMAEForPreTraining needs the decoder too: take a full "
            "pretraining checkpoint (with decoder_* tensors), or format transformers, which makes a ViTModel"
        )
    height, width = model.encoder.shape.image_size
    if height != width:
        raise ValueError(
            f"ViTMAEForPreTraining has a loss of square images alone, got {height} x {width} pixels: take "
            "format official, which holds the decoder too, or transformers for the encoder"
        )
    return model.decoder


def to_vit_mae(model: JEPA | MAE) -> Any:
    """An MAE as a `ViTMAEForPreTraining`, with weights of its own, in fp32 on the CPU.

    Raises:
        ValueError: as `decoder_of`.
    """
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    decoder = decoder_of(model)
    assert isinstance(model, MAE), "or there is no decoder"
    config = ViTMAEConfig(
        **sizes_of(model.encoder),
        decoder_hidden_size=decoder.decoder_embed.out_features,
        decoder_num_hidden_layers=len(decoder.decoder_blocks),
        decoder_num_attention_heads=heads_of(model)["decoder_heads"],
        decoder_intermediate_size=decoder.decoder_blocks.blocks()[0].mlp.fc1.out_features,
        mask_ratio=model.mask_ratio,
        norm_pix_loss=model.norm_pix_loss,
    )
    own = {name: tensor.detach() for name, tensor in decoder.state_dict().items()}
    state = {f"decoder.{name}": t for name, t in own.items() if not name.startswith("decoder_blocks.")}
    blocks = renamed_blocks(own, "decoder_blocks", "decoder_layers")
    state |= {f"decoder.{name}": tensor for name, tensor in blocks.items()}
    state |= {f"vit.{name}": tensor for name, tensor in renamed_encoder(model.encoder).items()}
    made = ViTMAEForPreTraining(config)
    load_strict(made, state, "ViTMAEForPreTraining")
    return made.eval()


def save_vit_mae(model: JEPA | MAE, folder: Path) -> None:
    """Write `config.json`, `model.safetensors` and `preprocessor_config.json` into `folder`."""
    with without_progress_bars():
        to_vit_mae(model).save_pretrained(folder)
        image_processor(model.encoder).save_pretrained(folder)
    # transformers 5 writes names for its older versions, and of the decoder's blocks a wrong one.
    path = folder / "model.safetensors"
    state = {name.replace(WRONG_BLOCKS, BLOCKS): tensor for name, tensor in load_file(path).items()}
    path.unlink()  # mapped into `state`, so it cannot be written over
    save_file(state, path, metadata={"format": "pt"})


@torch.no_grad()
def run_vit_mae(folder: Path, images: Tensor) -> Painted:
    """What transformers makes of the folder.

    Args:
        folder: as `save_vit_mae` wrote it.
        images: uint8 [B, C, H, W], of the encoder's size.
    """
    from transformers import AutoImageProcessor, ViTMAEForPreTraining

    with without_progress_bars():
        model = ViTMAEForPreTraining.from_pretrained(folder, local_files_only=True).eval()
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    pixels = processor(list(images), return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    patches = (model.config.image_size // model.config.patch_size) ** 2
    found = model(pixels, noise=noise_for(len(images), patches))
    model.config.mask_ratio = 0.0
    in_order = torch.arange(patches).expand(len(images), -1)  # [B, N]
    tokens = model.vit(pixels, noise=in_order).last_hidden_state
    return tokens, found.logits, found.mask, found.loss


@torch.no_grad()
def run_mae(model: JEPA | MAE, images: Tensor) -> Painted:
    """What `model` itself makes of uint8 images [B, C, H, W]."""
    assert isinstance(model, MAE), "`decoder_of` refused others"
    rows, columns = model.encoder.shape.grid
    order = noise_for(len(images), rows * columns).argsort(dim=1)  # [B, N]
    kept = int(rows * columns * (1 - model.mask_ratio))
    loss, pixels, _ = model(images, order[:, :kept], order[:, kept:], model.norm_pix_loss)
    mask = torch.ones(order.shape).scatter(1, order[:, :kept], 0)
    return model.encoder(images), pixels, mask, loss


def noise_for(batch: int, patches: int) -> Tensor:
    """[B, N], always the same; the patches with the most are hidden."""
    return torch.rand(batch, patches, generator=torch.Generator().manual_seed(0))

"""Weights in and out of other people's formats. Files are read as tensors only, never unpickled."""

from fastjepa.interop.head import LinearHead, load_head, save_head
from fastjepa.interop.huggingface import to_transformers
from fastjepa.interop.official import load_official, save_official
from fastjepa.interop.start import load_initial_weights
from fastjepa.interop.tensorfile import load_encoder, save_encoder
from fastjepa.interop.timm_vit import to_timm
from fastjepa.interop.vit_mae import to_vit_mae

__all__ = [
    "LinearHead",
    "load_encoder",
    "load_head",
    "load_initial_weights",
    "load_official",
    "save_encoder",
    "save_head",
    "save_official",
    "to_timm",
    "to_transformers",
    "to_vit_mae",
]

"""Weights in and out of other people's formats. Files are read as tensors only, never unpickled."""

from fastjepa.interop.official import load_official, save_official
from fastjepa.interop.start import load_initial_weights

__all__ = ["load_initial_weights", "load_official", "save_official"]

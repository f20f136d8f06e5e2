"""Encoders, predictors and decoders. All run over a packed stream of tokens."""

from fastjepa.models.init import Init, initialise
from fastjepa.models.mae_decoder import MAEDecoder
from fastjepa.models.predictor import Predictor
from fastjepa.models.sequences import Sequences, equal_sequences
from fastjepa.models.sizes import HEADS_OF_WIDTH, SIZES, NamedSize
from fastjepa.models.stack import Stack
from fastjepa.models.vit import VisionTransformer, ViTShape

__all__ = [
    "HEADS_OF_WIDTH",
    "SIZES",
    "Init",
    "MAEDecoder",
    "NamedSize",
    "Predictor",
    "Sequences",
    "Stack",
    "ViTShape",
    "VisionTransformer",
    "equal_sequences",
    "initialise",
]

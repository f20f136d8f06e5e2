"""What an image shows to the context encoder, and what is to be predicted."""

from fastjepa.masks.multiblock import MultiBlockMasks
from fastjepa.masks.random_masks import RandomMasks
from fastjepa.masks.types import Masks, MaskSampler

__all__ = ["MaskSampler", "Masks", "MultiBlockMasks", "RandomMasks"]

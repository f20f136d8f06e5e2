"""The networks that are scaled, and their masks: as published."""

from fastjepa.masks import MultiBlockMasks
from fastjepa.models import SIZES, ViTShape
from fastjepa.models.flops import Narrow
from fastjepa.planning.networks import Network


def named_network(name: str, patch_size: int, image_size: int = 224) -> Network:
    """One of fastjepa's sizes, on square images of `image_size` pixels."""
    size = SIZES[name]
    shape = ViTShape((image_size, image_size), patch_size, size.width, size.depth, size.heads, size.mlp_ratio)
    return Network(name, shape, Narrow(size.predictor_width, size.predictor_depth), size.predictor_heads)


def published_masks(network: Network) -> MultiBlockMasks:
    """Cut to the minimum of a micro-batch."""
    return MultiBlockMasks(grid=network.shape.grid, mode="truncate", seed=0)

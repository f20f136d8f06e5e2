import pytest
import torch

from fastjepa.models import HEADS_OF_WIDTH, SIZES, Predictor, VisionTransformer, ViTShape
from fastjepa.models.block import Block

# Width, depth, heads, head dim, MLP width; predictor's width, depth, head dim (its heads are the encoder's).
PUBLISHED = {
    "tiny": (192, 12, 3, 64, 768, None),
    "small": (384, 12, 6, 64, 1536, (384, 6, 64)),
    "base": (768, 12, 12, 64, 3072, (384, 6, 32)),
    "large": (1024, 24, 16, 64, 4096, (384, 12, 24)),
    "huge": (1280, 32, 16, 80, 5120, (384, 12, 24)),
    "giant": (1408, 40, 16, 88, 6144, (384, 16, 24)),
}


@pytest.mark.parametrize("name", SIZES)
def test_named_sizes_are_as_published(name: str) -> None:
    size = SIZES[name]
    width, depth, heads, head_dim, mlp_width, predictor_size = PUBLISHED[name]
    assert HEADS_OF_WIDTH[width] == heads
    with torch.device("meta"):
        shape = ViTShape((224, 224), 16, size.width, size.depth, size.heads, size.mlp_ratio)
        encoder = VisionTransformer(shape)
        predictor = Predictor(
            shape.grid, size.width, size.predictor_width, size.predictor_depth, size.predictor_heads
        )
    first, first_of_predictor = encoder.blocks[0], predictor.predictor_blocks[0]
    assert isinstance(first, Block)
    assert isinstance(first_of_predictor, Block)
    assert (size.width, len(encoder.blocks), size.heads) == (width, depth, heads)
    assert width // first.attn.heads == head_dim
    assert first.mlp.fc1.weight.shape == (mlp_width, width)
    assert predictor.predictor_proj.weight.shape == (width, size.predictor_width)
    if predictor_size is not None:
        heads_there = first_of_predictor.attn.heads
        assert heads_there == heads
        assert predictor_size == (
            size.predictor_width,
            len(predictor.predictor_blocks),
            size.predictor_width // heads_there,
        )

"""The sizes that have names, and what can be told from a width alone."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NamedSize:
    width: int
    depth: int
    heads: int
    mlp_ratio: float
    predictor_width: int
    predictor_depth: int
    predictor_heads: int


# arXiv:2301.08243, appendix A, and arXiv:2106.04560 for giant. The predictor has the encoder's heads.
SIZES = {
    "tiny": NamedSize(192, 12, 3, 4.0, 192, 6, 3),
    "small": NamedSize(384, 12, 6, 4.0, 384, 6, 6),
    "base": NamedSize(768, 12, 12, 4.0, 384, 6, 12),
    "large": NamedSize(1024, 24, 16, 4.0, 384, 12, 16),
    "huge": NamedSize(1280, 32, 16, 4.0, 384, 12, 16),
    "giant": NamedSize(1408, 40, 16, 48 / 11, 384, 16, 16),
}

HEADS_OF_WIDTH = {size.width: size.heads for size in SIZES.values()}

"""How much there is to compute and to load, and how long it takes at a given rate."""

from dataclasses import dataclass
from math import ceil

from fastjepa.models.flops import Tokens as FlopTokens
from fastjepa.models.flops import ijepa, mae, useful
from fastjepa.planning.networks import Network
from fastjepa.planning.tokens import Seen

# Dense bf16 FLOP/s of one device, as their makers state them.
PEAKS = {
    "a100": 312e12,
    "b200": 2250e12,
    "h100": 989e12,
    "h100-pcie": 756e12,
    "h200": 989e12,
    "l4": 121e12,
    "l40s": 362e12,
}
# Of that peak one H100 was measured to reach 33 % (ViT-B/16) to 39 % (ViT-H/14): docs/performance.md.
MFU = 0.35
# Of photograph-like JPEGs of 500 x 375, decoded, cropped and resized by Pillow: docs/data.md.
IMAGES_PER_CORE_SECOND = 220.0


@dataclass(frozen=True)
class Work:
    """Of a run.

    Attributes:
        flop: useful FLOPs of an image by part, backward as twice forward.
        images: over all steps.
    """

    flop: dict[str, float]
    images: int

    @property
    def image_flop(self) -> float:
        return sum(self.flop.values())


@dataclass(frozen=True)
class Pace:
    """Of a run at a rate of computing, all GPUs together.

    Attributes:
        images_per_second: that are trained on, and have to be loaded.
        hours: of all steps; judging and saving come on top.
        cores: that load them.
    """

    images_per_second: float
    hours: float
    cores: int


def image_flop(network: Network, seen: Seen) -> dict[str, float]:
    """Useful FLOPs of one image, part by part; with full blocks everywhere."""
    if network.is_mae:
        parts = mae(network.shape, network.predictor, images=1, kept=int(seen.context))
    else:
        tokens = FlopTokens([seen.context], seen.target, seen.blocks)
        parts = ijepa(network.shape, network.predictor, tokens)
    return {name: useful({name: part}) for name, part in parts.items() if part.total}


def pace(work: Work, gpus: int, flop_per_s: float, images_per_core_second: float) -> Pace:
    """Args:
    work: to be done.
    gpus: that share it.
    flop_per_s: useful ones of a GPU.
    images_per_core_second: that one core loads.
    """
    images_per_second = gpus * flop_per_s / work.image_flop
    return Pace(
        images_per_second,
        hours=work.images / images_per_second / 3600,
        cores=ceil(images_per_second / images_per_core_second),
    )

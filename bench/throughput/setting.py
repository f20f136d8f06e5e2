"""What is trained in a comparison: sizes, batch, precision and the images and masks that all rows see."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from fastjepa.config import Config, load_config
from fastjepa.engine.build import build_masks, build_shape
from fastjepa.masks import Masks
from fastjepa.models import SIZES, ViTShape
from fastjepa.models.flops import Narrow, Parts, Tokens, ijepa, mae, useful

Mode = Literal["truncate", "budget", "packed"]
_PICTURES = 3  # batches of images, gone through in turn

# The overrides that name a size. `small-6` and `toy` are for a CPU.
SHAPES: dict[str, tuple[str, ...]] = {
    "base": ("model.size=base", "model.patch_size=16", "data.image_size=224"),
    "large": ("model.size=large", "model.patch_size=16", "data.image_size=224"),
    "huge": ("model.size=huge", "model.patch_size=14", "data.image_size=224"),
    "small-6": ("model.size=small", "model.depth=6", "model.patch_size=16", "data.image_size=160"),
    "toy": (
        "model.size=free",
        "model.width=32",
        "model.depth=2",
        "model.heads=2",
        "model.predictor_width=16",
        "model.predictor_depth=2",
        "model.predictor_heads=2",
        "model.decoder_width=32",
        "model.decoder_depth=2",
        "model.decoder_heads=2",
        "model.patch_size=8",
        "data.image_size=64",
    ),
}


@dataclass(frozen=True)
class Setting:
    """A size on a device.

    Attributes:
        size: a key of SHAPES.
        batch: images of a step.
        precision: of the student: bf16 with fp32 masters, or fp32.
        mae_precision: of the reference MAE alone.
        draws: batches of masks, gone through in turn; in `truncate` they have nearly as many shapes.
    """

    size: str
    batch: int
    device: torch.device
    precision: Literal["fp32", "bf16"]
    mae_precision: Literal["fp32", "bf16", "fp16"]
    draws: int = 12

    def config(self, *overrides: str) -> Config:
        """A run of one process at stage 0, with `overrides` last."""
        common = (
            *SHAPES[self.size],
            f"optim.global_batch={self.batch}",
            f"optim.precision={self.precision}",
            "model.init=published",
            "speed.zero_stage=0",
            "speed.workers=0",
            f"speed.device={self.device.type}",
        )
        return load_config(None, [*common, *overrides])

    def shape(self, class_token: bool = False) -> ViTShape:
        return build_shape(self.config(f"objective.name={'mae' if class_token else 'jepa'}"))

    @cached_property
    def predictor(self) -> tuple[int, int, int]:
        """Width, depth, heads."""
        model = self.config().model
        named = SIZES.get(model.size)
        width = model.predictor_width or (named.predictor_width if named else 0)
        depth = model.predictor_depth or (named.predictor_depth if named else 0)
        return width, depth, model.predictor_heads or (named.predictor_heads if named else 0)

    @cached_property
    def decoder(self) -> tuple[int, int, int]:
        """Width, depth, heads of MAE's."""
        model = self.config().model
        return model.decoder_width, model.decoder_depth, model.decoder_heads


@dataclass
class Inputs:
    """Images and masks on the device, drawn once: step i sees the i-th of them, the same in all rows.

    References take the same images as normalised fp32, four times the bytes; it is made beforehand and not
    counted, as with a loader that normalises.
    """

    setting: Setting
    pixels: list[Tensor] = field(init=False)  # uint8 [B, C, H, W]
    normalised: list[Tensor] = field(init=False)  # fp32
    image_index: list[Tensor] = field(init=False)  # [B], on the host
    _masks: dict[str, list[Masks]] = field(default_factory=dict)
    _parts: dict[str, list[Parts]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        batch, device, data = self.setting.batch, self.setting.device, self.setting.config().data
        generator = torch.Generator().manual_seed(0)
        sides = (batch, data.channels, data.image_size, data.image_size)
        drawn = (torch.randint(256, sides, dtype=torch.uint8, generator=generator) for _ in range(_PICTURES))
        self.pixels = [pixels.to(device) for pixels in drawn]
        mean, std = (torch.tensor(each, device=device)[:, None, None] for each in (data.mean, data.std))
        self.normalised = [(pixels.float() / 255 - mean) / std for pixels in self.pixels]
        self.image_index = [torch.arange(batch) + i * batch for i in range(self.setting.draws)]

    def masks(self, name: Mode | Literal["mae"]) -> list[Masks]:
        """The batches of masks of consecutive steps; those of `mae` are random."""
        if name not in self._masks:
            which = ["objective.name=mae"] if name == "mae" else [f"masks.mode={name}"]
            sampler = build_masks(self.setting.config(*which))
            drawn = [sampler.sample(index, step=step) for step, index in enumerate(self.image_index)]
            self._masks[name] = [masks.to(self.setting.device) for masks in drawn]
        return self._masks[name]

    def tokens(self, mode: Mode) -> list[Tokens]:
        return [tokens_of(masks) for masks in self.masks(mode)]

    def context_tokens(self, name: Mode | Literal["mae"]) -> float:
        """The mean over images and steps."""
        lengths = [sum(tokens_of(masks).context) for masks in self.masks(name)]
        return sum(lengths) / (self.setting.draws * self.setting.batch)

    def parts(self, name: Mode | Literal["mae"]) -> list[Parts]:
        """FLOPs of the steps with full blocks."""
        if name not in self._parts:
            self._parts[name] = self._parts_of(name)
        return self._parts[name]

    def _parts_of(self, name: Mode | Literal["mae"]) -> list[Parts]:
        if name == "mae":
            kept = self.masks("mae")[0].context.shape[1]
            decoder = Narrow(*self.setting.decoder[:2])
            return [mae(self.setting.shape(class_token=True), decoder, self.setting.batch, kept)]
        shape, predictor = self.setting.shape(), Narrow(*self.setting.predictor[:2])
        return [ijepa(shape, predictor, tokens) for tokens in self.tokens(name)]

    def useful_flop(self, name: Mode | Literal["mae"]) -> float:
        """For one image, the mean over the steps."""
        parts = self.parts(name)
        return sum(map(useful, parts)) / len(parts) / self.setting.batch


def tokens_of(masks: Masks) -> Tokens:
    """How many tokens a batch of masks asks for."""
    blocks, images, target = masks.targets.shape
    if masks.cu_seqlens is None:
        return Tokens([masks.context.shape[1]] * images, target, blocks)
    return Tokens(masks.cu_seqlens.diff().tolist(), target, blocks)

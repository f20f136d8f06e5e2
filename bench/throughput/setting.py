"""What is trained in a comparison: sizes, batch, precision and the images and masks that all rows see."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from math import fsum
from typing import Literal

import torch
from torch import Tensor

from fastjepa.config import Config, load_config
from fastjepa.engine.build import build_masks, build_shape
from fastjepa.masks import Masks, MaskSampler
from fastjepa.models import SIZES, ViTShape
from fastjepa.models.flops import Narrow, Parts, Tokens, ijepa, mae, useful

Mode = Literal["truncate", "budget", "packed"]
Seen = Mode | Literal["mae"]
POOL = 256  # steps, of whose masks those that are measured are chosen
_WITHIN = 0.005  # of the mean work of the pool
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
        pool: steps of which they are chosen, so that their mean work is that of all of these.
    """

    size: str
    batch: int
    device: torch.device
    precision: Literal["fp32", "bf16"]
    mae_precision: Literal["fp32", "bf16", "fp16"]
    draws: int = 12
    pool: int = POOL

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

    def masks(self, name: Seen) -> list[Masks]:
        """The batches of masks of consecutive steps; those of `mae` are random."""
        if name not in self._masks:
            setting, sampler = self.setting, sampler_of(self.setting, name)
            drawn = [sampler.sample(images_of(setting, step), step=step) for step in self.chosen(name)]
            self._masks[name] = [masks.to(setting.device) for masks in drawn]
        return self._masks[name]

    def image_index(self, name: Seen) -> list[Tensor]:
        """Which images the masks are drawn for, [B] of each step, on the host."""
        return [images_of(self.setting, step) for step in self.chosen(name)]

    def chosen(self, name: Seen) -> list[int]:
        """The steps of the pool that are measured, in the order in which they are gone through."""
        return representative(self.population(name).flop, self.setting.draws)

    def population(self, name: Seen) -> "Population":
        return population(replace(self.setting, device=torch.device("cpu")), name)

    def tokens(self, mode: Mode) -> list[Tokens]:
        return [tokens_of(masks) for masks in self.masks(mode)]

    def context_tokens(self, name: Seen) -> float:
        """The mean over images and steps."""
        lengths = [sum(tokens_of(masks).context) for masks in self.masks(name)]
        return sum(lengths) / (self.setting.draws * self.setting.batch)

    def parts(self, name: Seen) -> list[Parts]:
        """FLOPs of the steps with full blocks."""
        if name not in self._parts:
            self._parts[name] = self._parts_of(name)
        return self._parts[name]

    def _parts_of(self, name: Seen) -> list[Parts]:
        if name == "mae":
            kept = self.masks("mae")[0].context.shape[1]
            decoder = Narrow(*self.setting.decoder[:2])
            return [mae(self.setting.shape(class_token=True), decoder, self.setting.batch, kept)]
        shape, predictor = self.setting.shape(), Narrow(*self.setting.predictor[:2])
        return [ijepa(shape, predictor, tokens) for tokens in self.tokens(name)]

    def step_flop(self, name: Seen, numbers: Sequence[int]) -> float:
        """Useful FLOPs of one step, the mean over the steps of these numbers."""
        parts = self.parts(name)
        return sum(useful(parts[number % len(parts)]) for number in numbers) / len(numbers)

    def useful_flop(self, name: Seen) -> float:
        """For one image, the mean over the steps."""
        parts = self.parts(name)
        return sum(map(useful, parts)) / len(parts) / self.setting.batch


@dataclass(frozen=True)
class Population:
    """Of many steps of a kind of masks.

    Attributes:
        context_tokens: the mean of an image, of each step.
        flop: useful, of each step.
    """

    context_tokens: list[float]
    flop: list[float]

    def means(self, batch: int) -> dict[str, float]:
        """Of an image, as a file keeps them."""
        steps = len(self.flop)
        return {
            "context_tokens": fsum(self.context_tokens) / steps,
            "useful_flop": fsum(self.flop) / steps / batch,
        }


@cache
def population(setting: Setting, name: Seen) -> Population:
    """The first `setting.pool` steps; where all are alike, one stands for them."""
    sampler, shape = sampler_of(setting, name), setting.shape(class_token=name == "mae")
    steps = setting.pool if name in ("truncate", "packed") else 1
    contexts, flop = [], []
    for step in range(steps):
        tokens = tokens_of(sampler.sample(images_of(setting, step), step=step))
        contexts.append(sum(tokens.context) / setting.batch)
        if name == "mae":
            kept = round(tokens.context[0])
            flop.append(useful(mae(shape, Narrow(*setting.decoder[:2]), setting.batch, kept)))
        else:
            flop.append(useful(ijepa(shape, Narrow(*setting.predictor[:2]), tokens)))
    repeat = setting.pool // steps
    return Population(contexts * repeat, flop * repeat)


def representative(values: Sequence[float], count: int) -> list[int]:
    """Indices of `count` values whose mean is that of all to within half a percent, where there are such.

    One from each of `count` strata at first, so that their spread is that of all too. Then one at a time is
    changed for the value that brings the mean nearest. They come from the two ends in turn, so that a few in
    a row have nearly the same mean as all.

    Raises:
        ValueError: there are not so many values.
    """
    if not 1 <= count <= len(values):
        raise ValueError(f"of {len(values)} values 1 to {len(values)} can be chosen, got {count}")
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    kept = [order[(2 * i + 1) * len(order) // (2 * count)] for i in range(count)]
    mean = fsum(values) / len(values)

    def off(among: Sequence[int]) -> float:
        return abs(fsum(values[i] for i in among) / count - mean)

    while off(kept) > _WITHIN * abs(mean):
        lacking = count * mean - fsum(values[i] for i in kept)
        free = [i for i in order if i not in kept]
        swaps = ((abs(lacking + values[a] - values[b]), at, b) for at, a in enumerate(kept) for b in free)
        _, at, other = min(swaps, default=(0.0, 0, kept[0]))
        changed = [*kept[:at], other, *kept[at + 1 :]]
        if off(changed) >= off(kept):
            break
        kept = changed
    kept.sort(key=lambda i: (values[i], i))
    return [kept[i // 2] if i % 2 == 0 else kept[-1 - i // 2] for i in range(count)]


def sampler_of(setting: Setting, name: Seen) -> MaskSampler:
    which = "objective.name=mae" if name == "mae" else f"masks.mode={name}"
    return build_masks(setting.config(which))


def images_of(setting: Setting, step: int) -> Tensor:
    """[B], on the host: no image comes twice."""
    return torch.arange(setting.batch) + step * setting.batch


def tokens_of(masks: Masks) -> Tokens:
    """How many tokens a batch of masks asks for."""
    blocks, images, target = masks.targets.shape
    if masks.cu_seqlens is None:
        return Tokens([masks.context.shape[1]] * images, target, blocks)
    return Tokens(masks.cu_seqlens.diff().tolist(), target, blocks)

"""The networks that are scaled: their parameters, group by group, and the tokens that a step sees."""

from dataclasses import dataclass
from functools import cache

import torch

from fastjepa.engine.launch import parameter_groups
from fastjepa.masks import MultiBlockMasks
from fastjepa.models import SIZES, Predictor, VisionTransformer, ViTShape
from fastjepa.models.flops import Narrow
from fastjepa.objectives.jepa import Student

STEPS_SAMPLED = 128  # of masks, whose sizes change from step to step


@dataclass(frozen=True)
class Group:
    """Parameters that an optimizer treats alike, and ZeRO flattens together.

    Attributes:
        numels: elements of each parameter.
        is_encoder: the target encoder has the same.
    """

    numels: tuple[int, ...]
    is_encoder: bool

    @property
    def numel(self) -> int:
        return sum(self.numels)


@dataclass(frozen=True)
class Network:
    """An encoder and its predictor, whose heads are `predictor_heads`."""

    name: str
    shape: ViTShape
    predictor: Narrow
    predictor_heads: int

    @property
    def patches(self) -> int:
        """N of an image."""
        return self.shape.grid[0] * self.shape.grid[1]

    @property
    def title(self) -> str:
        return f"{self.name[0].upper() if self.name != 'giant' else 'g'}/{self.shape.patch_size}"

    @property
    def groups(self) -> tuple[Group, ...]:
        return _groups_of(self)

    @property
    def parameters(self) -> int:
        """Of the student: encoder and predictor."""
        return sum(group.numel for group in self.groups)

    @property
    def encoder_parameters(self) -> int:
        return sum(group.numel for group in self.groups if group.is_encoder)

    @property
    def block_parameters(self) -> int:
        """Of one block of the encoder."""
        width, hidden = self.shape.width, round(self.shape.width * self.shape.mlp_ratio)
        return 4 * width * width + 2 * width * hidden + 9 * width + hidden


@dataclass(frozen=True)
class Seen:
    """Tokens of an image in a step, or their means over steps.

    Attributes:
        context: K.
        target: of one of the M blocks, P.
        asked: rows of the target encoder that some block asks for.
        blocks: M.
    """

    context: float
    target: float
    asked: float
    blocks: int = 4


def named_network(name: str, patch_size: int, image_size: int = 224) -> Network:
    """One of fastjepa's sizes, on square images of `image_size` pixels."""
    size = SIZES[name]
    shape = ViTShape((image_size, image_size), patch_size, size.width, size.depth, size.heads, size.mlp_ratio)
    return Network(name, shape, Narrow(size.predictor_width, size.predictor_depth), size.predictor_heads)


@cache
def _groups_of(network: Network) -> tuple[Group, ...]:
    """As the engine forms them, of a model without memory."""
    shape, narrow = network.shape, network.predictor
    with torch.device("meta"):
        encoder = VisionTransformer(shape)
        predictor = Predictor(shape.grid, shape.width, narrow.width, narrow.depth, network.predictor_heads)
    of_encoder = {id(parameter) for parameter in encoder.parameters()}
    return tuple(
        Group(tuple(p.numel() for p in group["params"]), id(group["params"][0]) in of_encoder)
        for group in parameter_groups(Student(encoder, predictor), weight_decay=0.0)
    )


@cache
def draws_of(network: Network, batch: int) -> tuple[Seen, ...]:
    """Steps of masks cut to the minimum of `batch` images, as published: the fewer images, the more
    context."""
    sampler = MultiBlockMasks(grid=network.shape.grid, mode="truncate", seed=0)
    draws = []
    for step in range(STEPS_SAMPLED):
        masks = sampler.sample(torch.arange(batch) + step * batch, step=step)
        assert masks.asked_rows is not None, "masks drawn on the CPU say which rows are asked for"
        asked = len(masks.asked_rows) / batch
        draws.append(Seen(masks.context.shape[1], masks.targets.shape[2], asked))
    return tuple(draws)


def seen_in(network: Network, batch: int) -> Seen:
    """The mean over steps, by which a step takes its time."""
    draws = draws_of(network, batch)
    return Seen(
        sum(each.context for each in draws) / len(draws),
        sum(each.target for each in draws) / len(draws),
        sum(each.asked for each in draws) / len(draws),
    )


def most_seen_in(network: Network, batch: int) -> Seen:
    """The largest step, which has to fit into memory."""
    return max(draws_of(network, batch), key=lambda each: each.blocks * (each.context + each.target))

"""The networks of a run: their parameters, group by group, as ZeRO cuts them."""

from dataclasses import dataclass
from functools import cache

import torch

from fastjepa.engine.launch import parameter_groups
from fastjepa.models import Predictor, VisionTransformer, ViTShape
from fastjepa.models.flops import Narrow
from fastjepa.objectives.jepa import Student


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

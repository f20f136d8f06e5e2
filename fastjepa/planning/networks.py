"""The networks of a run: their parameters, group by group, as ZeRO cuts them."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from fastjepa.config import Config, ConfigError
from fastjepa.engine.build import build_shape, build_size
from fastjepa.engine.launch import parameter_groups
from fastjepa.models import MAEDecoder, Predictor, VisionTransformer, ViTShape
from fastjepa.models.flops import Narrow
from fastjepa.objectives import MAE
from fastjepa.objectives.jepa import Student


@dataclass(frozen=True)
class Group:
    """Parameters that an optimizer treats alike, and ZeRO flattens together.

    Attributes:
        numels: elements of each parameter.
        is_encoder: of the encoder; the target encoder, where there is one, has the same.
    """

    numels: tuple[int, ...]
    is_encoder: bool

    @property
    def numel(self) -> int:
        return sum(self.numels)


@dataclass(frozen=True)
class Network:
    """An encoder and its predictor, whose heads are `predictor_heads`; or the decoder of MAE in its place."""

    name: str
    shape: ViTShape
    predictor: Narrow
    predictor_heads: int

    @property
    def is_mae(self) -> bool:
        """Whose encoder has a class token, and no target encoder beside it."""
        return self.shape.class_token

    @property
    def patches(self) -> int:
        """N of an image."""
        return self.shape.grid[0] * self.shape.grid[1]

    @property
    def patch_pixels(self) -> int:
        """Values of a patch: C p p."""
        return self.shape.channels * self.shape.patch_size**2

    @property
    def title(self) -> str:
        return f"{self.name[0].upper() if self.name != 'giant' else 'g'}/{self.shape.patch_size}"

    @property
    def groups(self) -> tuple[Group, ...]:
        return _groups_of(self)

    @property
    def parameters(self) -> int:
        """That are trained: of encoder and predictor."""
        return sum(group.numel for group in self.groups)

    @property
    def encoder_parameters(self) -> int:
        return sum(group.numel for group in self.groups if group.is_encoder)

    @property
    def block_parameters(self) -> int:
        """Of one block of the encoder."""
        width, hidden = self.shape.width, round(self.shape.width * self.shape.mlp_ratio)
        return 4 * width * width + 2 * width * hidden + 9 * width + hidden


def network_of(config: Config) -> Network:
    """That a configuration describes.

    Raises:
        ConfigError: there can be no such networks.
    """
    size, model = build_size(config), config.model
    if config.objective.name == "mae":
        head, heads = Narrow(model.decoder_width, model.decoder_depth), model.decoder_heads
    else:
        head, heads = Narrow(size.predictor_width, size.predictor_depth), size.predictor_heads
    try:
        network = Network(model.size, build_shape(config), head, heads)
        _groups_of(network)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return network


@cache
def _groups_of(network: Network) -> tuple[Group, ...]:
    """As the engine forms them, of a model without memory."""
    shape, narrow, heads = network.shape, network.predictor, network.predictor_heads
    with torch.device("meta"):
        # A mean and a deviation for each channel, which are no parameters.
        encoder = VisionTransformer(shape, (0.0,) * shape.channels, (1.0,) * shape.channels)
        trained: nn.Module
        if network.is_mae:
            trained = MAE(encoder, MAEDecoder(shape, narrow.width, narrow.depth, heads))
        else:
            predictor = Predictor(shape.grid, shape.width, narrow.width, narrow.depth, heads)
            trained = Student(encoder, predictor)
    of_encoder = {id(parameter) for parameter in encoder.parameters()}
    return tuple(
        Group(tuple(p.numel() for p in group["params"]), id(group["params"][0]) in of_encoder)
        for group in parameter_groups(trained, weight_decay=0.0)
    )

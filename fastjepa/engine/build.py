"""From a configuration to the parts of a run."""

import torch

from fastjepa.config import Config, ConfigError
from fastjepa.data.decoders import NoDecoder, choose_decoder
from fastjepa.data.order import GlobalOrder
from fastjepa.data.transforms import Augmentation
from fastjepa.data.views import Reading
from fastjepa.engine.schedules import Schedule
from fastjepa.masks import MultiBlockMasks, RandomMasks
from fastjepa.masks.in_sight import share_in_sight
from fastjepa.models import (
    SIZES,
    Init,
    MAEDecoder,
    NamedSize,
    Predictor,
    VisionTransformer,
    ViTShape,
    initialise,
)
from fastjepa.objectives import JEPA, MAE

MOST_IN_SIGHT = 0.1  # of the target patches; published recipes have 0, 7 x 7 patches under truncate 0.03


def build_shape(config: Config) -> ViTShape:
    """The encoder's shape; a class token only for MAE."""
    size, image = build_size(config), config.data.image_size
    return ViTShape(
        image_size=(image, image),
        patch_size=config.model.patch_size,
        width=size.width,
        depth=size.depth,
        heads=size.heads,
        mlp_ratio=size.mlp_ratio,
        channels=config.data.channels,
        class_token=config.objective.name == "mae",
    )


def build_size(config: Config) -> NamedSize:
    """The named size, with what the configuration sets instead."""
    model = config.model
    named = SIZES.get(model.size)
    width = model.width or (named.width if named else 0)
    heads = model.heads or (named.heads if named else 0)
    return NamedSize(
        width=width,
        depth=model.depth or (named.depth if named else 0),
        heads=heads,
        mlp_ratio=model.mlp_ratio or (named.mlp_ratio if named else 4.0),
        predictor_width=model.predictor_width or (named.predictor_width if named else width // 2),
        predictor_depth=model.predictor_depth or (named.predictor_depth if named else 4),
        predictor_heads=model.predictor_heads or (named.predictor_heads if named else heads),
    )


def build_heads(config: Config) -> dict[str, int]:
    """The attention heads of each network, which its tensors do not show."""
    size = build_size(config)
    return {"encoder": size.heads, "predictor": size.predictor_heads}


def build_model(config: Config) -> JEPA | MAE:
    """A model with its initial weights, on the CPU, in fp32: the same on every rank."""
    size = build_size(config)
    try:
        shape = build_shape(config)
        encoder = VisionTransformer(shape, config.data.mean, config.data.std)
        if config.objective.name == "jepa":
            head: Predictor | MAEDecoder = Predictor(
                shape.grid, shape.width, size.predictor_width, size.predictor_depth, size.predictor_heads
            )
        else:
            model = config.model
            head = MAEDecoder(shape, model.decoder_width, model.decoder_depth, model.decoder_heads)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    generator = torch.Generator().manual_seed(config.run.seed)
    published: Init = "published" if config.objective.name == "jepa" else "mae"
    scheme = published if config.model.init == "published" else config.model.init
    initialise(encoder, scheme, generator)
    initialise(head, scheme, generator)
    if isinstance(head, Predictor):
        return JEPA(encoder, head)
    return MAE(encoder, head, config.masks.mask_ratio, config.objective.norm_pix_loss)


def build_masks(config: Config) -> MultiBlockMasks | RandomMasks:
    """The sampler of the objective's masks."""
    masks = config.masks
    try:
        grid = build_shape(config).grid
        if config.objective.name == "mae":
            return RandomMasks(grid, masks.mask_ratio, config.run.seed)
        sampler = MultiBlockMasks(
            grid=grid,
            mode=masks.mode,
            seed=config.run.seed,
            context_tokens=masks.context_tokens,
            target_tokens=masks.target_tokens,
            target_blocks=masks.target_blocks,
            target_scale=masks.target_scale,
            target_aspect=masks.target_aspect,
            context_scale=masks.context_scale,
            context_aspect=masks.context_aspect,
            min_keep=masks.min_keep,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if (share := share_in_sight(sampler)) > MOST_IN_SIGHT:
        needed = "masks.min_keep" if masks.context_tokens is None else "masks.context_tokens"
        raise ConfigError(
            f"{share:.0%} of the patches to be predicted would be in sight, at most {MOST_IN_SIGHT:.0%} may: "
            f"on a grid of {grid[0]} x {grid[1]} patches hardly any context is as long as {needed} asks for. "
            "Lower it, or use larger images or smaller patches"
        )
    return sampler


def build_schedule(config: Config, steps_per_epoch: int) -> Schedule:
    """The schedules over the whole run, epochs turned into steps."""
    optim = config.optim
    steps = optim.steps if optim.steps is not None else round((optim.epochs or 0) * steps_per_epoch)
    try:
        return Schedule(
            steps=steps,
            warmup_steps=round(optim.warmup_epochs * steps_per_epoch),
            lr=optim.lr,
            start_lr=optim.start_lr,
            final_lr=optim.final_lr,
            weight_decay=optim.weight_decay,
            final_weight_decay=optim.final_weight_decay,
            momentum=optim.momentum,
            final_momentum=optim.final_momentum,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def build_order(config: Config, images: int, shard_ends: tuple[int, ...] = ()) -> GlobalOrder:
    """The order of the training images; `shard_ends` as of `RunImages`."""
    try:
        return GlobalOrder(
            images,
            config.optim.global_batch,
            config.run.seed,
            shard_ends=shard_ends,
            shuffle_shards=config.data.shuffle_shards,
        )
    except ValueError as error:
        raise ConfigError(f"optim.global_batch: {error}") from error


def build_reading(config: Config) -> Reading:
    """How training images become views."""
    name = config.speed.decoder
    if name == "auto" and config.data.name == "fashion_mnist":
        name = "pillow"  # nothing is decoded, and to look for torchvision takes a second
    try:
        decoder = choose_decoder(name)
    except NoDecoder as error:
        raise ConfigError(str(error)) from error
    return Reading(decoder, config.speed.augment, config.data.max_bad_fraction)


def build_augmentation(config: Config) -> Augmentation:
    try:
        return Augmentation(config.data.crop_scale, config.data.crop_ratio, config.data.flip)
    except ValueError as error:
        raise ConfigError(str(error)) from error

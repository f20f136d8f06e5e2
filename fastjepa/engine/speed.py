"""What `speed` says of the networks: how they compute, never what."""

import warnings

import torch

from fastjepa.config import Config, ConfigError
from fastjepa.models import Stack
from fastjepa.models.fp8 import Fp8Encoder
from fastjepa.objectives import JEPA, MAE


def apply_speed(model: JEPA | MAE, config: Config, device: torch.device) -> None:
    """Set how the networks of `model` run, once they are on `device` and in their precision.

    Raises:
        ConfigError: the settings do not go together, or the device cannot do them; with what is possible.
    """
    speed = config.speed
    if config.optim.precision == "fp32" and speed.target_precision != "auto":
        raise ConfigError(
            f"speed.target_precision {speed.target_precision} needs optim.precision bf16; beside an fp32 "
            "student the target encoder computes in fp32: leave it at auto"
        )
    for module in model.modules():
        if isinstance(module, Stack):
            module.recompute = speed.checkpoint_blocks
            module.is_fused = speed.fused_blocks and not speed.compile
            if speed.compile:
                module.compile_blocks()
    if not isinstance(model, JEPA):
        return
    model.skip_dead_work = model.predictor.skip_dead_work = speed.skip_dead_work
    if speed.target_stream:
        if device.type != "cuda":
            raise ConfigError(f"speed.target_stream needs a GPU: there are no streams on {device.type}")
        model.target_stream = torch.cuda.Stream(device)
    if speed.target_precision == "fp8":
        model.fp8 = _fp8(model)


def _fp8(model: JEPA) -> Fp8Encoder | None:
    """None, with one warning, where the device has no fp8: results then come a little slower and truer."""
    try:
        return Fp8Encoder(model.target_encoder)
    except ValueError as error:
        warnings.warn(f"speed.target_precision fp8: {error}; the target encoder runs in bf16", stacklevel=2)
        return None

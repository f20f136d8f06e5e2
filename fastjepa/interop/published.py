"""Reading the published files, and what else is in them besides weights."""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastjepa.objectives import JEPA

State = dict[str, Tensor]
PREFIX = "module."  # left in the names by DistributedDataParallel
HEADS = "fastjepa_heads"  # an entry of our own, where heads are other than published
NETWORKS = ("encoder", "predictor", "target_encoder")


@dataclass(frozen=True)
class Published:
    """Attributes:
    states: state dicts without prefix: ``model`` for MAE; encoder, predictor and target_encoder for I-JEPA.
    extras: the other entries of an I-JEPA file.
    heads: that the file tells, as `load_official` takes them; empty for those of others.
    """

    states: dict[str, State]
    extras: dict[str, Any]
    heads: dict[str, int]


def read_published(path: Path) -> Published:
    """Read a published checkpoint, weights only.

    Raises:
        ValueError: it is no such file, or holds objects that only unpickling could make.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # MAE keeps its arguments
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # on a damaged file torch fails in any way there is, with IndexError too
        # torch's own message advises to load without protection; only the name it gives is of use.
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"it holds a Python object, {found[1]}, which could run code; only tensors and numbers are read"
            if found
            else "it is damaged, or was not written by torch.save"
        )
        raise ValueError(f"{path} was not loaded: {reason}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of state dicts")
    wanted = NETWORKS if all(name in content for name in NETWORKS) else ("model",)
    if not all(_is_state(content.get(name)) for name in wanted):
        raise ValueError(
            f"{path} is neither a published I-JEPA checkpoint (encoder, predictor, target_encoder) nor an "
            f"MAE one (model); it holds {', '.join(map(str, list(content)[:8])) or 'nothing'}"
        )
    states = {
        name: {key.removeprefix(PREFIX): tensor for key, tensor in content[name].items()} for name in wanted
    }
    extras = {key: value for key, value in content.items() if key not in (*wanted, HEADS)}
    heads = content.get(HEADS, {})
    if not isinstance(heads, Mapping) or not all(type(number) is int for number in heads.values()):
        raise ValueError(f"{path} was not loaded: its {HEADS} are no numbers of heads")
    return Published(states, extras, dict(heads))


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
    )


def fresh_extras(model: JEPA) -> dict[str, Any]:
    """What a published I-JEPA file holds besides weights, as at the start of training.

    The published optimizer has four groups: what is decayed of the encoder and of the predictor, then what
    is not. There the position tables are (frozen) parameters, and count among those decayed.
    """
    tables = {"pos_embed", "predictor_pos_embed"}
    groups: list[dict[str, Any]] = []
    first = 0
    for decayed in (True, False):
        for network in (model.encoder, model.predictor):
            count = sum((tensor.ndim > 1) == decayed for tensor in _parameters(network, tables))
            groups.append(_adamw_group(range(first, first + count), decayed))
            first += count
    scaler = {
        "scale": 65536.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "_growth_tracker": 0,
    }
    return {
        "opt": {"state": {}, "param_groups": groups},
        "scaler": scaler,
        "epoch": 0,
        "loss": 0.0,
        "batch_size": 0,
        "world_size": 1,
        "lr": 0.0,
    }


def _parameters(network: nn.Module, tables: set[str]) -> list[Tensor]:
    return [*network.parameters(), *(t for name, t in network.named_buffers() if name in tables)]


def _adamw_group(indices: range, decayed: bool) -> dict[str, Any]:
    """A group as torch itself writes it, with the published mark on what is not decayed."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], weight_decay=0.01 if decayed else 0.0)
    group = dict(optimizer.state_dict()["param_groups"][0])
    group["params"] = list(indices)
    if not decayed:
        group["WD_exclude"] = True
    return group

"""A linear classifier on frozen features, as a small file of its own.

A safetensors file: `weight` [classes, D] and `bias` [classes] in fp32, and where they are known the names of
the classes, a JSON list under `class_names` in its metadata.

    logits = features @ weight.T + bias

`features` [B, D] is the mean of an image's patch tokens after the encoder's final norm, as it is: what was
fitted to standardised features is first turned into a head for plain ones (`of_plain_features`).
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class LinearHead:
    """Attributes:
    weight: fp32 [classes, D].
    bias: fp32 [classes].
    class_names: one for each row of `weight`; empty if not known.
    """

    weight: Tensor
    bias: Tensor
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or not len(self.weight) or self.bias.shape != self.weight.shape[:1]:
            raise ValueError(
                f"a head is weight [classes, D] and bias [classes], got {list(self.weight.shape)} and "
                f"{list(self.bias.shape)}"
            )
        if self.class_names and len(self.class_names) != len(self.weight):
            raise ValueError(f"{len(self.class_names)} class names for {len(self.weight)} classes")
        if not (self.weight.isfinite().all() and self.bias.isfinite().all()):
            raise ValueError("a weight of the head is not finite: what it was fitted to has diverged")

    @property
    def names(self) -> tuple[str, ...]:
        """The class names, or their numbers."""
        return self.class_names or tuple(map(str, range(len(self.weight))))

    def logits(self, features: Tensor) -> Tensor:
        """[B, classes], of features [B, D]."""
        return torch.addmm(self.bias, features, self.weight.T)


def of_plain_features(head: LinearHead, mean: Tensor, scale: Tensor) -> LinearHead:
    """The head that says of features what `head` says of (features - mean) / scale.

    Args:
        head: fitted to standardised features.
        mean: [D], that was taken off.
        scale: [D], that they were divided by; infinite for a dimension that tells nothing.
    """
    weight = head.weight.double() / scale.double()  # [classes, D]
    bias = head.bias.double() - weight @ mean.double()
    return LinearHead(weight.float(), bias.float(), head.class_names)


def save_head(head: LinearHead, path: str | os.PathLike[str]) -> None:
    """Write a head. A file of that name is replaced whole or, if writing fails, not at all."""
    target = Path(path)
    partial = target.with_name(target.name + ".tmp")
    tensors = {"weight": head.weight.float().contiguous(), "bias": head.bias.float().contiguous()}
    named = {"class_names": json.dumps(head.class_names)} if head.class_names else None
    try:
        save_file(tensors, partial, metadata=named)
        os.replace(partial, target)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(f"writing {target}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _some(names: list[str]) -> str:
    """A few of them: a whole encoder has hundreds."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more if names else "nothing"


def load_head(path: str | os.PathLike[str], width: int | None = None) -> LinearHead:
    """Read a head.

    Args:
        path: of the file.
        width: D of the encoder it is for; None not to look.

    Raises:
        ValueError: it is no such file, or its head is for features of another width.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if not {"weight", "bias"} <= names:
                raise ValueError(f"it holds {_some(sorted(names))}, not weight and bias")
            weight, bias = file.get_tensor("weight").float(), file.get_tensor("bias").float()
            classes = json.loads((file.metadata() or {}).get("class_names", "[]"))
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise ValueError("its class_names are no JSON list of names")
        head = LinearHead(weight, bias, tuple(classes))
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not used as a head: it is no safetensors file, as fastjepa.interop.save_head writes "
            f"one ({error})"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not used as a head: {error}") from error
    if width is not None and head.weight.shape[1] != width:
        raise ValueError(
            f"{path} is a head for features of width {head.weight.shape[1]}, and the encoder's are {width} "
            "wide: was it fitted to another encoder?"
        )
    return head

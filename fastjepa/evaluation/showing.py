"""What a snapshot shows besides features, as tensors: computed where the networks are, drawn where none is.

All of it is small: 0.1 MB for 28 x 28 pixels in patches of 4, 2.4 MB for ViT-H/14 at 224.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TypeVar

from torch import Tensor

Shown = TypeVar("Shown", bound="Predictions | Retrieved | Painted | Neighbours | Attended")


@dataclass(frozen=True)
class Predictions:
    """How near a predictor came to the layer-normed target tokens; each fp16 [M, n, P], in -1 to 1.

    The mean target of a place is that over the images of a bank.

    Attributes:
        cosine: of prediction and target.
        of_mean: of the target and the mean target of its place: what one has without a look at the image.
        centred: of prediction and target, that mean taken off both; 0 is no better than it.
        of_others: the same of the prediction and the targets of the other images there, on the average.
    """

    cosine: Tensor
    of_mean: Tensor
    centred: Tensor
    of_others: Tensor


@dataclass(frozen=True)
class Retrieved:
    """Pixels of the bank patches whose target tokens are nearest; by cosine, the bank's mean taken off.

    Where blocks overlap, the first of them counts. Pictures have `side` pixels for each patch.

    Attributes:
        by_prediction: uint8 [n, C, h side, w side], the images, each hidden patch that of the bank nearest
            to what the predictor says.
        by_target: the same, nearest to the true target token.
        by_mean: the same, nearest to the mean target of the place.
        example_image: int64 [e], which image an example is of; `example_block` and `example_place` alike.
        examples: uint8 [e, 1 + 2 k, C, q, q], patches amid their surroundings: the hidden one, the k nearest
            to the prediction, the k nearest to the true target.
    """

    by_prediction: Tensor
    by_target: Tensor
    by_mean: Tensor
    example_image: Tensor
    example_block: Tensor
    example_place: Tensor
    examples: Tensor


@dataclass(frozen=True)
class Painted:
    """What a MAE paints where it does not see.

    Attributes:
        painted: uint8 [n, C, h side, w side], the images, each hidden patch as the decoder has it.
        given: the same, each hidden patch with what the decoder was not asked for and got.
        is_normalised: bool [], whether that is its own mean and contrast; otherwise it is the mean colour of
            what is seen.
        correlation: fp16 [n, P] within each hidden patch, of the pixels painted and the true ones; nan where
            the true ones are all alike.
        of_mean: the same of the mean patch of the place over a bank of images, and the true one.
    """

    painted: Tensor
    given: Tensor
    is_normalised: Tensor
    correlation: Tensor
    of_mean: Tensor


@dataclass(frozen=True)
class Neighbours:
    """The images of a bank that are nearest to those shown, nearest first.

    Attributes:
        by_features: uint8 [n, k, C, t, t], by mean-pooled tokens.
        by_pixels: uint8 [n, k, C, t, t], by raw pixels.
        feature_labels, pixel_labels: int64 [n, k]; -1 without labels.
        labels: int64 [n], of the images shown.
        bank_labels: int64 [b], of the bank.
    """

    by_features: Tensor
    by_pixels: Tensor
    feature_labels: Tensor
    pixel_labels: Tensor
    labels: Tensor
    bank_labels: Tensor


@dataclass(frozen=True)
class Attended:
    """Attention to patches in an encoder's last block; each fp16 [n, heads, N], where 1 is an equal share.

    Attributes:
        from_patch: of the patch at `place`.
        received: of all patches, on the average.
        from_class: of the class token; [n, 0, N] without one.
        place: int64 [], of that patch in the grid.
    """

    from_patch: Tensor
    received: Tensor
    from_class: Tensor
    place: Tensor


@dataclass(frozen=True)
class Showing:
    """What there is of all that; a part is None where it was not computed."""

    predictions: Predictions | None = None
    retrieved: Retrieved | None = None
    painted: Painted | None = None
    neighbours: Neighbours | None = None
    attended: Attended | None = None

    def tensors(self) -> dict[str, Tensor]:
        """By name, as `showing_of` reads them."""
        parts = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {
            f"{name}.{field.name}": getattr(part, field.name)
            for name, part in parts
            if part is not None
            for field in fields(part)
        }


def showing_of(tensors: Mapping[str, Tensor]) -> Showing:
    """From the tensors of a snapshot, with any others among them."""
    return Showing(
        predictions=_part("predictions", Predictions, tensors),
        retrieved=_part("retrieved", Retrieved, tensors),
        painted=_part("painted", Painted, tensors),
        neighbours=_part("neighbours", Neighbours, tensors),
        attended=_part("attended", Attended, tensors),
    )


def _part(name: str, kind: type[Shown], tensors: Mapping[str, Tensor]) -> Shown | None:
    """None unless all of it is there."""
    keys = {field.name: f"{name}.{field.name}" for field in fields(kind)}
    if not tensors.keys() >= set(keys.values()):
        return None
    return kind(**{field: tensors[key] for field, key in keys.items()})

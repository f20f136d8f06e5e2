"""What one forward pass of an objective hands to the training loop."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """Attributes:
    loss: scalar, with gradient.
    hidden: [R, D] encoder tokens before the final norm, for the measures of collapse: the target encoder's
        for JEPA, the encoder's own for MAE. No gradient.
    places: int64 [..., B, P], which of them are looked at, image by image; for JEPA those that are predicted.
    prediction: [..., D] what the predictor or decoder said. No gradient.
    """

    loss: Tensor
    hidden: Tensor
    places: Tensor
    prediction: Tensor

    def features(self) -> Tensor:
        """hidden at `places`: [B, n, D]."""
        by_image = self.places.movedim(-2, 0).flatten(1)  # [B, n]
        return self.hidden[by_image]

"""What one forward pass of an objective hands to the training loop."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """Attributes:
    loss: scalar, with gradient.
    hidden: [B, N, D] encoder tokens before the final norm, for the measures of collapse: the target
        encoder's for JEPA, the encoder's own for MAE. No gradient.
    prediction: [..., D] what the predictor or decoder said. No gradient.
    """

    loss: Tensor
    hidden: Tensor
    prediction: Tensor

"""What one forward pass of an objective hands to the training loop."""

from dataclasses import dataclass

from torch import Tensor

WATCHED = 32  # images whose features are looked at for signs of collapse


@dataclass(frozen=True)
class Step:
    """Attributes:
    loss: scalar, with gradient.
    prediction: [..., D] what the predictor or decoder said. No gradient.
    hidden: [B, n, D] encoder tokens before the final norm: the target encoder's for JEPA, the encoder's own
        for MAE. No gradient. None where the pass has not computed all of them.
    """

    loss: Tensor
    prediction: Tensor
    hidden: Tensor | None = None

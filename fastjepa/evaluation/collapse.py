"""Signs of collapse, measured on features: tensors in, 0-d tensors out, read when it suits.

The loss cannot tell. A target encoder that says the same about everything is the easiest one to
predict, so a collapsing run has the best loss of all. Nor can any one measure: tokens that tell only
their place have a healthy deviation over all tokens, an untrained encoder has a fair rank. So the
deviation over tokens, the deviation over images and the rank are watched together, the latter two
against what they were at initialisation, because their healthy size depends on the data and the width.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# A warning is due below these; the numbers behind them are of small encoders on 28-pixel images.
# Layer-normed tokens deviate by 1 at most. Healthy: 0.5 and more; without stop-gradient: 0.02 after a
# hundred steps.
TARGET_STD_LOW = 0.1
# Of the start: an encoder that learns tells images apart better than its random weights did.
BETWEEN_IMAGES_FALL = 0.5
# Of the start. Height proves nothing, but with too high a learning rate this was the only bad sign:
# 32 -> 3 and kNN 49 % -> 30 %, at a target_std of 0.74 and a between_image_std as at the start.
RANKME_FALL = 0.5
# Of the target's. A sound predictor learns the mean first and passes through 0.07.
PREDICTION_STD_LOW = 0.05

REPEATED = 4  # a warning comes again after so many times as many log lines as the last
RECOVERED = 3  # log lines without a bad sign, so that one at its limit does not come and go

_LAYER_NORM_EPS = 1e-5  # of the targets in the loss


@dataclass(frozen=True)
class CollapseSigns:
    """The measures at one step, as read from the device; on the hidden states of the target encoder."""

    target_std: float  # `token_std`
    between_image_std: float
    token_rankme: float  # `rankme` of all tokens
    prediction_std: float  # `prediction_std`


def collapse_warning(signs: CollapseSigns, start: CollapseSigns) -> str | None:
    """What is wrong with the features, in a sentence with the numbers; None when no sign is bad.

    Args:
        signs: now.
        start: the same measures at initialisation, on images of the same kind and number.
    """
    if not all(math.isfinite(value) for value in vars(signs).values()):
        return "the features are not finite: the run has diverged; go back to a checkpoint with a lower rate"
    if signs.target_std < TARGET_STD_LOW:
        return (
            f"the target says nearly the same about every token (target_std {signs.target_std:.3f}, below "
            f"{TARGET_STD_LOW}; 0.5 and more is healthy): a low loss is no sign of learning now"
        )
    if signs.between_image_std < BETWEEN_IMAGES_FALL * start.between_image_std:
        return (
            f"images look ever more alike to the target (between_image_std {signs.between_image_std:.3f}, "
            f"{start.between_image_std:.3f} at the start) though tokens differ (target_std "
            f"{signs.target_std:.3f}): they tell their place and not what they show"
        )
    if signs.token_rankme < RANKME_FALL * start.token_rankme:
        return (
            f"the target uses few dimensions (token_rankme {signs.token_rankme:.1f}, "
            f"{start.token_rankme:.1f} at the start): dimensional collapse, though tokens may still differ"
        )
    if signs.prediction_std < PREDICTION_STD_LOW * signs.target_std:
        return (
            f"the predictor says the same everywhere (prediction_std {signs.prediction_std:.3f}, target_std "
            f"{signs.target_std:.3f}): it has found the mean and nothing else"
        )
    return None


@dataclass
class CollapseWatch:
    """When to speak of it: as it begins, at ever longer intervals while it lasts, and when it is over.

    Attributes:
        since: the step at which it began; None when nothing is wrong.
        last: the last step with a bad sign.
        lines: log lines with one, since then, and
        speak_at: at how many of them the next is to be told.
        sound: log lines without one in a row.
    """

    since: int | None = None
    last: int = 0
    lines: int = 0
    speak_at: int = 1
    sound: int = 0

    def heed(self, step: int, warning: str | None) -> str | None:
        """What to tell people at a log line, if anything; `warning` is of `collapse_warning` there."""
        if warning is None:
            return self._sound_line(step)
        if self.since is None:
            self.since, self.lines, self.speak_at = step, 0, 1
        self.last, self.sound = step, 0
        self.lines += 1
        if self.lines < self.speak_at:
            return None
        self.speak_at *= REPEATED
        again = "" if self.lines == 1 else f", and since step {self.since}"
        return f"step {step}{again}: {warning}"

    def _sound_line(self, step: int) -> str | None:
        if self.since is None:
            return None
        self.sound += 1
        if self.sound < RECOVERED:
            return None
        since, self.since = self.since, None
        return f"step {step}: no sign of collapse any more; there were some from step {since} to {self.last}"


@torch.no_grad()
def rankme(z: Tensor) -> Tensor:
    """Effective rank: the exponential of the entropy of the normalised singular values.

    RankMe (Garrido et al., ICML 2023, arXiv:2210.02885): p = s / sum(s) + 1e-7 over the singular
    values s, exp(-sum(p log p)). Computed in float64 from the smaller Gram matrix, whose rounding
    puts a floor of about 1e-8 of the largest under the singular values, below that epsilon.

    Args:
        z: [n, D] features, n well above D, or the number of rows is what gets measured.

    Returns:
        float64 0-d in about [1, min(n, D)]; NaN if a feature is not finite. Reading the status of the
        eigenvalue solver makes the host wait for the device once.
    """
    z = z.double()
    gram = z.T @ z if z.shape[0] >= z.shape[1] else z @ z.T
    finite = torch.isfinite(gram).all()
    # The solver raises on NaN; a diverged run should be reported, not ended, by its measures.
    singular = torch.linalg.eigvalsh(torch.where(finite, gram, 0)).clamp_min(0).sqrt()
    return torch.where(finite, effective_rank(singular), torch.nan)


def effective_rank(values: Tensor) -> Tensor:
    """exp of the entropy of p = v / sum(v) + 1e-7, over values of at least 0; the epsilon is RankMe's."""
    p = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny) + 1e-7
    return torch.exp(-(p * p.log()).sum())


@torch.no_grad()
def token_std(hidden: Tensor) -> Tensor:
    """How much tokens differ from one another: `target_std`.

    Layer norm without affine, as the loss takes its targets, then the standard deviation over all
    tokens per dimension, averaged over the dimensions. A normalised token has a mean square of 1, so
    this is at most about 1.

    Args:
        hidden: [B, N, D] of any float type, before the final norm.

    Returns:
        fp32 0-d.
    """
    return _layer_norm(hidden).flatten(0, 1).std(dim=0).mean()


@torch.no_grad()
def between_image_std(hidden: Tensor) -> Tensor:
    """How much images differ from one another: as `token_std`, of the mean over the tokens of an image.

    Tokens that tell only where they are, not what they show, have a healthy `token_std` and none of this.
    """
    return _layer_norm(hidden).mean(dim=1).std(dim=0).mean()


@torch.no_grad()
def prediction_std(prediction: Tensor) -> Tensor:
    """How much predictions differ from one another; not normalised, as the loss takes them.

    Args:
        prediction: [..., D] of any float type, usually [M, B, P, D].

    Returns:
        fp32 0-d.
    """
    return prediction.float().flatten(0, -2).std(dim=0).mean()


def _layer_norm(hidden: Tensor) -> Tensor:
    return F.layer_norm(hidden.float(), hidden.shape[-1:], eps=_LAYER_NORM_EPS)

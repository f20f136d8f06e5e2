"""The linear probe by gradient descent: many heads at once, over features that are there already.

A published linear accuracy is the best of several learning rates, with and without BatchNorm before the
head. The heads differ in nothing that the features depend on, so their weights lie side by side in one
matrix [H, C, D] and a step is two matrix products for all of them, its forward and its gradient: features
are gathered once and kernels are launched as often as for one head. BatchNorm without affine parameters
(as in MAE, arXiv:2111.06377) is an affine map of the features, which goes into the weights:

    W ((x - mean) / std)  =  (W / std) x - (W / std) mean
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from fastjepa.evaluation.linear import check_rows
from fastjepa.evaluation.low_shot import split_of_classes

_MOMENTUM = 0.9
_BATCH_OF_RATES = 256  # images: learning rates are for so many, and scale with the batch
_WARM_UP = 0.1  # of the steps
_NORM_EPS = 1e-6  # of BatchNorm, and
_NORM_MOMENTUM = 0.1  # how much a batch counts in its running statistics
_TRUST = 1e-3  # of LARS
_INITIAL_STD = 0.01
_LOGITS_AT_ONCE = 1 << 24  # when heads are judged, of fp32: 64 MiB


@dataclass(frozen=True)
class Head:
    """How one head is trained.

    Attributes:
        lr: at the peak, for 256 images; in proportion for other batches.
        batch_norm: the features are normalised before it.
        optimizer: SGD with momentum .9, or LARS (You et al., arXiv:1708.03888), whose step on the weights is
            in proportion to their size.
        weight_decay: on the weights, not the bias, added to the gradient.
    """

    lr: float
    batch_norm: bool
    optimizer: Literal["sgd", "lars"] = "sgd"
    weight_decay: float = 0.0

    def __str__(self) -> str:
        norm = "BatchNorm" if self.batch_norm else "no norm"
        return f"{self.optimizer.upper()}, lr {self.lr:g}, {norm}"


# Raw features want rates ten times apart for encoders of different scale; normalised ones hardly differ.
HEADS = (
    *(Head(lr, batch_norm) for batch_norm, lr in product((False, True), (0.03, 0.1, 0.3, 1.0))),
    Head(3.0, True, "lars"),
    Head(10.0, True, "lars"),
)


@dataclass(frozen=True)
class SweepSettings:
    """Attributes:
    epochs: over the training rows.
    batch: images of a step.
    held_out: fraction of the training rows of every class on which the best head is chosen.
    """

    epochs: int = 90
    batch: int = 512
    held_out: float = 0.1


@dataclass
class Heads:
    """Linear heads on the same features, with what their optimizers remember.

    Attributes:
        weight: fp32 [H, C, D], of normalised features where a head has BatchNorm.
        bias: fp32 [H, C].
        mean, variance: running statistics of the features, fp32 [D].
    """

    heads: tuple[Head, ...]
    weight: Tensor
    bias: Tensor
    mean: Tensor
    variance: Tensor
    _weight_velocity: Tensor = field(init=False, repr=False)
    _bias_velocity: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._weight_velocity, self._bias_velocity = (
            torch.zeros_like(self.weight),
            torch.zeros_like(self.bias),
        )
        where = self.weight.device
        self._lr = torch.tensor([head.lr for head in self.heads], device=where)[:, None]  # [H, 1]
        self._decay = torch.tensor([head.weight_decay for head in self.heads], device=where)[:, None, None]
        self._is_lars = torch.tensor([head.optimizer == "lars" for head in self.heads], device=where)
        self._has_norm = torch.tensor([head.batch_norm for head in self.heads], device=where)[:, None, None]
        self._any_decay = any(head.weight_decay for head in self.heads)
        self._any_lars = any(head.optimizer == "lars" for head in self.heads)

    @classmethod
    def start(cls, heads: Sequence[Head], width: int, classes: int, like: Tensor, seed: int) -> "Heads":
        """Weights of deviation .01, the same for every head, and no bias, where `like` is."""
        weight = torch.randn(1, classes, width, generator=torch.Generator().manual_seed(seed)) * _INITIAL_STD
        return cls(
            tuple(heads),
            weight.to(like.device).repeat(len(heads), 1, 1),
            torch.zeros(len(heads), classes, device=like.device),
            torch.zeros(width, device=like.device),
            torch.ones(width, device=like.device),
        )

    @torch.no_grad()
    def step(self, features: Tensor, labels: Tensor, rate: float) -> None:
        """One step of every head on the mean cross-entropy of a batch.

        Args:
            features: fp32 [b, D], b at least 2.
            labels: int64 [b].
            rate: what every head's learning rate is multiplied by.
        """
        count = len(features)
        mean = features.mean(dim=0)  # [D]
        variance = (features - mean).square_().mean(dim=0)  # [D]; on a CPU many times faster than torch.var
        self.mean.lerp_(mean, _NORM_MOMENTUM)
        self.variance.lerp_(variance * (count / (count - 1)), _NORM_MOMENTUM)  # unbiased, as torch keeps it
        wrong = self._logits(features, mean, variance).softmax(dim=1)  # [H, C, b]
        index = labels.expand(len(self.heads), 1, -1)
        wrong.scatter_add_(1, index, wrong.new_full((), -1.0).expand_as(index))
        wrong /= count
        for_bias = wrong.sum(dim=2)  # [H, C]
        for_weight = (wrong.flatten(0, 1) @ features).view_as(self.weight)  # [H, C, D]
        scale, shift = self._norm(mean, variance)
        for_weight.addcmul_(for_bias[..., None], shift, value=-1).mul_(scale)
        self._apply(for_weight, for_bias, rate)

    def _apply(self, for_weight: Tensor, for_bias: Tensor, rate: float) -> None:
        if self._any_decay:
            for_weight.addcmul_(self.weight, self._decay)
        if self._any_lars:
            size, step = self.weight.norm(dim=(1, 2)), for_weight.norm(dim=(1, 2))  # [H] each
            is_scaled = self._is_lars & (size > 0) & (step > 0)
            for_weight.mul_(torch.where(is_scaled, _TRUST * size / step, 1.0)[:, None, None])
        self._weight_velocity.mul_(_MOMENTUM).add_(for_weight)
        self._bias_velocity.mul_(_MOMENTUM).add_(for_bias)
        self.weight.addcmul_(self._weight_velocity, self._lr[..., None], value=-rate)
        self.bias.addcmul_(self._bias_velocity, self._lr, value=-rate)

    def _norm(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """What BatchNorm multiplies features by and takes off before, 1 and 0 without: [H, 1, D] each."""
        scale = torch.where(self._has_norm, (variance + _NORM_EPS).rsqrt(), 1.0)
        return scale, torch.where(self._has_norm, mean, 0.0)

    def _logits(self, features: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """Of each head for each row: [H, C, b], the rows last, where a softmax over C is fastest."""
        scale, shift = self._norm(mean, variance)
        weight = self.weight * scale  # [H, C, D]
        bias = self.bias - (weight @ shift.mT)[..., 0]  # [H, C]
        logits = torch.addmm(bias.view(-1, 1), weight.flatten(0, 1), features.T)  # [H C, b]
        return logits.view(*bias.shape, len(features))

    @torch.no_grad()
    def correct(self, features: Tensor, labels: Tensor) -> Tensor:
        """Which rows each head gets right, with the running statistics: bool [H, n].

        A head that has diverged gets none right.
        """
        rows = max(1, _LOGITS_AT_ONCE // self.bias.numel())
        found = []
        for some, wanted in zip(features.split(rows), labels.split(rows), strict=True):
            logits = self._logits(some, self.mean, self.variance)
            right = logits.argmax(dim=1) == wanted  # [H, b]
            found.append(right & logits.isfinite().all(dim=1))
        return torch.cat(found, dim=1)

    def only(self, number: int) -> "Heads":
        """One of them, its optimizer afresh."""
        one = slice(number, number + 1)
        return Heads(
            self.heads[one], self.weight[one].clone(), self.bias[one].clone(), self.mean, self.variance
        )


@dataclass(frozen=True)
class Sweep:
    """What a sweep found.

    Attributes:
        best: the head chosen on held-out training rows, and
        correct: which test rows it gets right, bool [m].
        held_out: accuracy of every head there, in the order of `heads`.
    """

    heads: tuple[Head, ...]
    best: Head
    correct: Tensor
    held_out: tuple[float, ...]


def sweep(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    heads: Sequence[Head] = HEADS,
    settings: SweepSettings | None = None,
    seed: int = 0,
) -> Sweep:
    """Train every head at once, choose the best on held-out training rows, test that one.

    Args:
        train: fp32 [n, D] features.
        train_labels: int64 [n], from 0.
        test: [m, D], on the same device. The test rows choose nothing.
        test_labels: int64 [m].
        heads: what to train; ties go to the first.
        settings: epochs, batch and held-out part.
        seed: of the split, the initial weights and the order.

    Raises:
        ValueError: shapes that do not fit, too few rows, or a feature that is not finite.
    """
    settings = settings or SweepSettings()
    check_rows("training", train, train_labels, at_least=5)
    check_rows("test", test, test_labels, at_least=1)
    held_out, fitted = split_of_classes(train_labels, settings.held_out, seed)
    if not len(held_out):
        raise ValueError(
            "there is one training row of each class, so that none can be held out to choose the best head: "
            "give a class with two rows or more"
        )
    classes = int(torch.maximum(train_labels.max(), test_labels.max())) + 1
    trained = train_heads(train[fitted], train_labels[fitted], classes, heads, settings, seed)
    right = trained.correct(train[held_out], train_labels[held_out]).double().mean(dim=1)  # [H]
    best = int(right.argmax())
    correct = trained.only(best).correct(test, test_labels)[0]
    return Sweep(tuple(heads), heads[best], correct, tuple(right.tolist()))


def train_heads(
    features: Tensor,
    labels: Tensor,
    classes: int,
    heads: Sequence[Head],
    settings: SweepSettings,
    seed: int = 0,
) -> Heads:
    """Heads after all epochs, each over the rows in an order of its own; what is left of a batch waits.

    The rate rises linearly over the first tenth of the steps and falls to 0 as a cosine.

    Args:
        features: fp32 [n, D], n at least 2.
        labels: int64 [n].
    """
    trained = Heads.start(heads, features.shape[1], classes, features, seed)
    batch = min(settings.batch, len(features))
    each = len(features) // batch
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(settings.epochs):
        order = torch.randperm(len(features), generator=generator).to(features.device)
        for number, rows in enumerate(order[: each * batch].split(batch)):
            rate = rate_at(epoch * each + number, settings.epochs * each) * batch / _BATCH_OF_RATES
            trained.step(features[rows], labels[rows], rate)
    # Of all rows, for they are there; after few steps running statistics hold much of what they began with.
    trained.variance, trained.mean = torch.var_mean(features, dim=0)
    return trained


def rate_at(step: int, steps: int) -> float:
    """The fraction of the peak rate at a step of 0 to steps - 1: a linear rise, then a cosine to 0."""
    rise = math.ceil(_WARM_UP * steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))

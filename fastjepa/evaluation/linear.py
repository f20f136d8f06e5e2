"""The linear probe: multinomial logistic regression on frozen features.

Every set of features gets the regularisation that suits it, chosen on a part of the training
labels. With one strength for all, a comparison would measure how well that strength fits the
scale of the features; raw pixels and a narrow encoder want strengths a hundred times apart.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa.evaluation.features import standardise

# Strong to weak, so that each solution is a good start for the next. Between two decades the
# accuracy moves by 0.3 points or less.
L2_STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
_VALIDATION_PART = 0.2
# 100 more iterations, or a tolerance ten times smaller, move the accuracy by less than 0.1 points.
_MAX_ITERATIONS = 100
_GRADIENT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class LinearProbe:
    """What the probe found: the accuracy on the test rows, and the strength it chose."""

    accuracy: float
    l2: float


@dataclass(frozen=True)
class LinearClassifier:
    """logits = features @ weight.T + bias."""

    weight: Tensor  # [classes, D]
    bias: Tensor  # [classes]

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """The fraction of rows of `features` [n, D] whose largest logit is that of their label."""
        return self.correct(features, labels).double().mean().item()

    def correct(self, features: Tensor, labels: Tensor) -> Tensor:
        """Which rows of `features` [n, D] have their largest logit at their label: bool [n]."""
        logits = torch.addmm(self.bias, features, self.weight.T)  # [n, classes]
        return logits.argmax(dim=1) == labels


def fit_linear(
    features: Tensor, labels: Tensor, l2: float, classes: int, start: LinearClassifier | None = None
) -> LinearClassifier:
    """Minimise mean cross-entropy + l2 / 2 * |weight|^2 by full-batch L-BFGS.

    Args:
        features: fp32 [n, D], standardised; all rows are used at once.
        labels: int64 [n] in [0, classes).
        l2: strength on the weights (not the bias), at least 0; scikit-learn's C is 1 / (l2 * n).
        classes: how many there are, even if some have no row.
        start: where to begin; zeros when None.

    Returns:
        The classifier, for features standardised in the same way.
    """
    weight = features.new_zeros(classes, features.shape[1]) if start is None else start.weight.clone()
    bias = features.new_zeros(classes) if start is None else start.bias.clone()
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=_MAX_ITERATIONS,
        tolerance_grad=_GRADIENT_TOLERANCE,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = torch.addmm(bias, features, weight.T)  # [n, classes]
        loss = F.cross_entropy(logits, labels) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return LinearClassifier(weight.detach(), bias.detach())


def linear_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, seed: int = 0
) -> LinearProbe:
    """The accuracy on the test rows of the classifier of `linear_correct`; arguments as there."""
    right, l2 = linear_correct(train, train_labels, test, test_labels, seed)
    return LinearProbe(accuracy=right.double().mean().item(), l2=l2)


def linear_correct(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, seed: int = 0
) -> tuple[Tensor, float]:
    """Train a linear classifier on frozen features, and see which test rows it gets right.

    Features are standardised with the mean and deviation of the training rows. The strength is
    chosen from `L2_STRENGTHS` by the accuracy on a fifth of the training rows, held out by `seed`;
    the classifier tested is then trained on all of them with it. The test rows choose nothing.

    Args:
        train: [n, D] features, n at least 5.
        train_labels: int64 [n], from 0.
        test: [m, D] features on the same device.
        test_labels: int64 [m], from 0.
        seed: of the split into training and held-out rows.

    Returns:
        bool [m], and the strength.

    Raises:
        ValueError: shapes that do not fit, too few rows, or a feature that is not finite.
    """
    check_rows("training", train, train_labels, at_least=5)
    check_rows("test", test, test_labels, at_least=1)
    train, test = standardise(train.float(), test.float())
    classes = int(torch.maximum(train_labels.max(), test_labels.max())) + 1
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).to(train.device)
    held_out, fitted = order.tensor_split([int(len(train) * _VALIDATION_PART)])

    best_accuracy, best_l2, best = -1.0, 0.0, None
    classifier = None
    for l2 in L2_STRENGTHS:
        classifier = fit_linear(train[fitted], train_labels[fitted], l2, classes, start=classifier)
        accuracy = classifier.accuracy(train[held_out], train_labels[held_out])
        if accuracy > best_accuracy:  # a tie goes to the stronger one
            best_accuracy, best_l2, best = accuracy, l2, classifier
    refitted = fit_linear(train, train_labels, best_l2, classes, start=best)
    return refitted.correct(test, test_labels), best_l2


def check_rows(name: str, features: Tensor, labels: Tensor, at_least: int) -> None:
    """Refuse features [n, D] that a probe cannot use, and say which those are: `name`."""
    if features.ndim != 2 or labels.shape != features.shape[:1] or len(labels) < at_least:
        raise ValueError(
            f"{name} features are {list(features.shape)} with labels {list(labels.shape)}: "
            f"expected [n, D] and [n] with n at least {at_least}"
        )
    if not torch.isfinite(features).all():
        raise ValueError(
            f"the {name} features are not all finite: the encoder has diverged, or its input was bad"
        )
    if labels.min() < 0:
        raise ValueError(f"a {name} label is negative: leave rows without a label out of the probe")

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from fastjepa.data.fashion_mnist import FashionMNIST
from fastjepa.evaluation import fit_linear, linear_accuracy
from fastjepa.evaluation.linear import L2_STRENGTHS

Split = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def clothes() -> tuple[Split, Split]:
    train, test = FashionMNIST(split="train"), FashionMNIST(split="test")
    return (
        (train.images[:3000].flatten(1).float() / 255, train.labels[:3000]),
        (test.images.flatten(1).float() / 255, test.labels),
    )


def random_features(pixels: Tensor, width: int = 64) -> Tensor:
    """A fixed random layer: features of the size an encoder has."""
    weight = torch.randn(784, width, generator=torch.Generator().manual_seed(0)) / 28
    return torch.relu(pixels @ weight)


def scikit_learn_accuracy(train: Split, test: Split, l2: float) -> float:
    scaler = StandardScaler().fit(train[0])
    model = LogisticRegression(C=1 / (l2 * len(train[0])), max_iter=500)
    model.fit(scaler.transform(train[0]), train[1])
    return float(model.score(scaler.transform(test[0]), test[1]))


@pytest.mark.parametrize("l2", [1e-1, 1e-2, 1e-3])
def test_fit_agrees_with_scikit_learn(clothes: tuple[Split, Split], l2: float) -> None:
    (train, labels), (test, test_labels) = clothes
    train, test = random_features(train), random_features(test)
    wanted = scikit_learn_accuracy((train, labels), (test, test_labels), l2)
    std, mean = torch.std_mean(train, dim=0, correction=0)
    classifier = fit_linear((train - mean) / std, labels, l2, classes=10)
    assert abs(classifier.accuracy((test - mean) / std, test_labels) - wanted) < 0.003


def test_probe_agrees_with_scikit_learn_on_pixels(clothes: tuple[Split, Split]) -> None:
    (train, labels), test = clothes
    train, labels = train[:1500], labels[:1500]
    found = linear_accuracy(train, labels, *test, seed=0)
    assert abs(found.accuracy - scikit_learn_accuracy((train, labels), test, found.l2)) < 0.003
    assert 0.77 < found.accuracy < 0.83  # known for 1,500 rows; 0.836 for 10,000


def test_every_set_of_features_gets_its_own_strength(clothes: tuple[Split, Split]) -> None:
    (train, labels), (test, test_labels) = clothes
    many = linear_accuracy(train[:400], labels[:400], test, test_labels)
    few = linear_accuracy(random_features(train, 16), labels, random_features(test, 16), test_labels)
    assert many.l2 > few.l2
    assert {many.l2, few.l2} <= set(L2_STRENGTHS)


def test_test_labels_choose_nothing(clothes: tuple[Split, Split]) -> None:
    (train, labels), (test, test_labels) = clothes
    train, test = random_features(train, 16), random_features(test, 16)
    right = linear_accuracy(train, labels, test, test_labels, seed=1)
    shuffled = linear_accuracy(train, labels, test, (test_labels + 1) % 10, seed=1)
    assert right.l2 == shuffled.l2
    assert shuffled.accuracy < 0.2
    assert linear_accuracy(train, labels, test, test_labels, seed=1) == right


@settings(max_examples=10, deadline=None)
@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-100, 100))
def test_scale_and_shift_of_features_do_not_matter(scale: float, shift: float) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat(40)
    features = torch.eye(3)[labels] + 0.5 * torch.randn(120, 3, generator=generator)
    plain = linear_accuracy(features[:90], labels[:90], features[90:], labels[90:])
    moved = features * scale + shift * scale
    assert linear_accuracy(moved[:90], labels[:90], moved[90:], labels[90:]).accuracy == pytest.approx(
        plain.accuracy, abs=0.04
    )


def test_constant_columns_tell_nothing() -> None:
    labels = torch.arange(2).repeat(50)
    # Equal up to rounding, yet the rounding is the label: blown up, it would be a perfect feature.
    leak = 1000.0 + labels * 1e-4
    features = torch.stack([leak, torch.full((100,), 3.0)], dim=1)
    assert linear_accuracy(features, labels, features, labels).accuracy == 0.5


def test_errors_name_the_rows() -> None:
    features, labels = torch.rand(10, 3), torch.arange(10) % 2
    with pytest.raises(ValueError, match="test features are not all finite"):
        linear_accuracy(features, labels, features * torch.nan, labels)
    with pytest.raises(ValueError, match="n at least 5"):
        linear_accuracy(features[:4], labels[:4], features, labels)
    with pytest.raises(ValueError, match="training label is negative"):
        linear_accuracy(features, labels - 1, features, labels)

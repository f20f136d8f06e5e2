from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from fastjepa.data.fashion_mnist import FashionMNIST
from fastjepa.evaluation.features import standardise
from fastjepa.evaluation.sweep import HEADS, Head, Heads, SweepSettings, rate_at, sweep, train_heads

WIDTH, CLASSES = 48, 10
Sample = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def clothes() -> Sample:
    """Random features [2000, WIDTH] and [2000, WIDTH] of real images, with labels."""
    train, test = FashionMNIST(split="train"), FashionMNIST(split="test")
    weight = torch.randn(784, WIDTH, generator=torch.Generator().manual_seed(0)) / 28
    features = [torch.relu(some.images[:2000].flatten(1).float() / 255 @ weight) for some in (train, test)]
    return features[0], train.labels[:2000], features[1], test.labels[:2000]


def lars_(parameter: Tensor, velocity: Tensor, lr: float, decay: float) -> None:
    """Algorithm 1 of the LARS paper, with the trust .001 that MAE's probe has."""
    assert parameter.grad is not None
    step = parameter.grad
    if parameter.ndim > 1:
        step = step + decay * parameter
        step = step * (1e-3 * parameter.norm() / step.norm())
    velocity.mul_(0.9).add_(step)
    parameter.data.sub_(lr * velocity)


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_head_is_torchs_batch_norm_and_linear(clothes: Sample, batch_norm: bool, optimizer: str) -> None:
    features, labels, test, test_labels = clothes
    head = Head(0.5, batch_norm, optimizer, weight_decay=0.01)  # type: ignore[arg-type]
    ours = Heads.start([Head(0.1, not batch_norm), head], WIDTH, CLASSES, features, seed=3)
    norm = nn.BatchNorm1d(WIDTH, affine=False, eps=1e-6) if batch_norm else nn.Identity()
    linear = nn.Linear(WIDTH, CLASSES)
    theirs = nn.Sequential(norm, linear)
    weight, bias = linear.weight, linear.bias
    with torch.no_grad():
        weight.copy_(ours.weight[1])
        bias.zero_()
    groups: list[dict[str, Any]] = [{"params": [weight], "weight_decay": 0.01}, {"params": [bias]}]
    sgd = torch.optim.SGD(groups, lr=0.5, momentum=0.9)
    velocities = torch.zeros_like(weight), torch.zeros_like(bias)
    for some, wanted in zip(features.split(100), labels.split(100), strict=True):
        ours.step(some, wanted, rate=1.0)
        sgd.zero_grad()
        F.cross_entropy(theirs(some), wanted).backward()
        if optimizer == "sgd":
            sgd.step()
        else:
            lars_(weight, velocities[0], 0.5, 0.01)
            lars_(bias, velocities[1], 0.5, 0.0)
    torch.testing.assert_close(ours.weight[1], weight.detach(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(ours.bias[1], bias.detach(), rtol=1e-3, atol=1e-5)
    if isinstance(norm, nn.BatchNorm1d):
        torch.testing.assert_close(ours.mean, norm.running_mean)
        torch.testing.assert_close(ours.variance, norm.running_var)
    right = theirs.eval()(test).argmax(dim=1) == test_labels
    assert (ours.correct(test, test_labels)[1] != right).sum() <= 1  # a tie that rounding decides


def test_heads_do_not_meet(clothes: Sample) -> None:
    features, labels, test, test_labels = clothes
    how = SweepSettings(epochs=2, batch=200)
    together = train_heads(features, labels, CLASSES, HEADS, how)
    for number in (0, 5, len(HEADS) - 1):
        alone = train_heads(features, labels, CLASSES, HEADS[number : number + 1], how)
        torch.testing.assert_close(alone.weight[0], together.weight[number], rtol=1e-3, atol=1e-5)
        one = together.only(number)
        assert torch.equal(one.correct(test, test_labels)[0], together.correct(test, test_labels)[number])


def test_a_head_that_diverges_neither_wins_nor_spoils_others(clothes: Sample) -> None:
    how = SweepSettings(epochs=3, batch=200)
    sane = Head(0.1, True)
    found = sweep(*clothes, [Head(3e38, False), sane, Head(3e38, True)], how)
    assert found.best == sane
    assert (found.held_out[0], found.held_out[2]) == (0, 0)
    alone = sweep(*clothes, [sane], how)
    assert (found.correct != alone.correct).sum() <= 2
    assert alone.correct.double().mean() > 0.6


@pytest.mark.parametrize("l2", [1e-1, 1e-2])
def test_at_convergence_a_head_agrees_with_scikit_learn(clothes: Sample, l2: float) -> None:
    train, labels, test, test_labels = clothes
    train, test = standardise(train, test)
    how = SweepSettings(epochs=800, batch=len(train))
    lr = 0.15 * 256 / len(train)
    trained = train_heads(train, labels, CLASSES, [Head(lr, False, "sgd", weight_decay=l2)], how)
    reference = LogisticRegression(C=1 / (l2 * len(train)), max_iter=1000, tol=1e-6).fit(train, labels)
    found = trained.correct(test, test_labels)[0].double().mean().item()
    assert abs(found - reference.score(test, test_labels)) < 0.003


def test_test_labels_choose_nothing(clothes: Sample) -> None:
    train, labels, test, test_labels = clothes
    how = SweepSettings(epochs=3, batch=200)
    right = sweep(train, labels, test, test_labels, settings=how)
    wrong = sweep(train, labels, test, (test_labels + 1) % CLASSES, settings=how)
    assert (right.best, right.held_out) == (wrong.best, wrong.held_out)
    assert not (right.correct & wrong.correct).any()
    again = sweep(train, labels, test, test_labels, settings=how)
    assert torch.equal(again.correct, right.correct)


def test_what_cannot_be_trained_on_is_named(clothes: Sample) -> None:
    train, labels, test, test_labels = clothes
    with pytest.raises(ValueError, match="training features are not all finite"):
        sweep(train * torch.nan, labels, test, test_labels)
    with pytest.raises(ValueError, match="n at least 5"):
        sweep(train[:3], labels[:3], test, test_labels)


@given(steps=st.integers(1, 500))
def test_rates_rise_and_fall(steps: int) -> None:
    rates = [rate_at(step, steps) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert steps < 20 or rates[-1] < 0.05


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_the_seed_alone_says_where_heads_start(seed: int) -> None:
    like = torch.zeros(1)
    one = Heads.start(HEADS, 8, 3, like, seed)
    assert torch.equal(one.weight, Heads.start(HEADS, 8, 3, like, seed).weight)
    assert torch.equal(one.weight[0], one.weight[-1])


def test_one_row_of_each_class_leaves_none_to_choose_on() -> None:
    features, labels = torch.randn(6, 3), torch.arange(6)
    with pytest.raises(ValueError, match="none can be held out to choose the best head"):
        sweep(features, labels, features, labels)


def test_batch_norm_is_tested_as_it_was_trained_however_few_the_steps_are() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    z = torch.randn(4, 16, generator=generator)[labels] + torch.randn(400, 16, generator=generator)
    z = 100 + 0.1 * z
    train, test = slice(300), slice(300, 400)
    settings = SweepSettings(epochs=20)  # of one step each
    found = sweep(z[train], labels[train], z[test], labels[test], [Head(0.3, True)], settings)
    assert found.correct.double().mean() > 0.85

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastjepa.data.fashion_mnist import FashionMNIST
from fastjepa.evaluation import linear_accuracy
from fastjepa.evaluation.low_shot import low_shot_correct, split_of_classes

labels_lists = st.lists(st.integers(0, 4), min_size=1, max_size=200)


@given(labels=labels_lists, fraction=st.floats(0.01, 0.99), seed=st.integers(0, 1000))
def test_a_split_takes_of_every_class(labels: list[int], fraction: float, seed: int) -> None:
    given_labels = torch.tensor(labels)
    drawn, left = split_of_classes(given_labels, fraction, seed)
    assert sorted([*drawn.tolist(), *left.tolist()]) == list(range(len(labels)))
    assert drawn.tolist() == sorted(drawn.tolist())
    for label in set(labels):
        count, whole = int((given_labels[drawn] == label).sum()), labels.count(label)
        assert count == min(max(1, round(fraction * whole)), whole - 1)
    assert torch.equal(split_of_classes(given_labels, fraction, seed)[0], drawn)


def test_draws_differ_and_are_even() -> None:
    labels = torch.arange(4).repeat(250)
    draws = torch.stack([split_of_classes(labels, 0.1, seed)[0] for seed in range(40)])  # [40, 100]
    assert len({tuple(draw.tolist()) for draw in draws}) == 40
    # Each row is drawn 4 times in 40; a row in front is no likelier than one at the end.
    assert torch.bincount(draws.flatten(), minlength=1000)[:500].sum() / draws.numel() == pytest.approx(
        0.5, abs=0.03
    )


def test_few_labels_are_worth_less_and_each_draw_is_a_probe_of_its_own() -> None:
    train, test = FashionMNIST(split="train"), FashionMNIST(split="test")
    weight = torch.randn(784, 32, generator=torch.Generator().manual_seed(0)) / 28
    x, y = (torch.relu(some.images[:2000].flatten(1).float() / 255 @ weight) for some in (train, test))
    labels, wanted = train.labels[:2000], test.labels[:2000]
    few, strengths = low_shot_correct(x, labels, y, wanted, 0.01, splits=3, seed=7)
    more, _ = low_shot_correct(x, labels, y, wanted, 0.1, splits=3, seed=7)
    assert few.shape == (3, 2000)
    assert len(strengths) == 3
    assert 0.3 < few.double().mean() < more.double().mean() < 0.85
    rows, _ = split_of_classes(labels, 0.01, 8)
    alone = linear_accuracy(x[rows], labels[rows], y, wanted, seed=8)
    assert few[1].double().mean().item() == pytest.approx(alone.accuracy)
    with pytest.raises(ValueError, match="n at least 5"):
        low_shot_correct(x[:30], labels[:30] % 2, y, wanted % 2, 0.01, splits=2)

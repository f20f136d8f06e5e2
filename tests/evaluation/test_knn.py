import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from fastjepa.data.fashion_mnist import FashionMNIST
from fastjepa.evaluation import knn as knn_module
from fastjepa.evaluation import knn_accuracy, knn_correct


def pixels(split: str, count: int) -> tuple[Tensor, Tensor]:
    clothes = FashionMNIST(split=split)  # type: ignore[arg-type]
    return clothes.images[:count].flatten(1).float() / 255, clothes.labels[:count]


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (10, 0.07), (20, 0.07), (100, 0.07), (20, 0.01)])
def test_agrees_with_scikit_learn(k: int, temperature: float) -> None:
    bank, bank_labels = pixels("train", 1500)
    queries, query_labels = pixels("test", 500)
    reference = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp(-d / temperature))
    wanted = reference.fit(bank, bank_labels).score(queries, query_labels)
    found = knn_accuracy(bank, bank_labels, queries, query_labels, k, temperature)
    assert abs(found - wanted) <= 1 / 500  # one tie that rounding decides


def test_all_ks_at_once_are_each_alone() -> None:
    bank, bank_labels = pixels("train", 400)
    queries, query_labels = pixels("test", 150)
    found = knn_correct(bank, bank_labels, queries, query_labels, ks=(100, 1, 20))
    assert found.shape == (3, 150)
    for right, k in zip(found, (100, 1, 20), strict=True):
        alone = knn_accuracy(bank, bank_labels, queries, query_labels, k)
        assert right.double().mean().item() == pytest.approx(alone)
    assert len({tuple(right.tolist()) for right in found}) == 3


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, bank_labels = pixels("train", 300)
    queries, query_labels = pixels("test", 101)
    whole = knn_accuracy(bank, bank_labels, queries, query_labels)
    monkeypatch.setattr(knn_module, "_SIMILARITIES_AT_ONCE", 300 * 10)
    assert knn_accuracy(bank, bank_labels, queries, query_labels) == whole


@settings(deadline=None)
@given(k=st.integers(1, 40), temperature=st.floats(1e-4, 10), seed=st.integers(0, 1000))
def test_a_query_in_its_own_cluster_is_always_right(k: int, temperature: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(4).repeat_interleave(40)
    bank = torch.eye(4)[labels] * 5 + torch.rand(160, 4, generator=generator)
    queries = torch.eye(4) * 3 + 0.2
    assert knn_accuracy(bank, labels, queries, torch.arange(4), k, temperature) == 1.0


def test_near_neighbours_outweigh_many_far_ones() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 1, 1])
    query = torch.tensor([[1.0, 0.3]])
    assert knn_accuracy(bank, labels, query, torch.tensor([0]), k=4, temperature=0.07) == 1.0
    assert knn_accuracy(bank, labels, query, torch.tensor([1]), k=4, temperature=10.0) == 1.0


def test_errors_name_what_is_allowed() -> None:
    bank, labels = torch.rand(5, 3), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match="give a k of 1 to 5"):
        knn_accuracy(bank, labels, bank, labels, k=6)
    with pytest.raises(ValueError, match="above 0"):
        knn_accuracy(bank, labels, bank, labels, k=1, temperature=0)
    with pytest.raises(ValueError, match="every feature needs one label"):
        knn_accuracy(bank, labels[:4], bank, labels, k=1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", [0, 1])
def test_features_that_are_not_finite_are_refused(part: int, value: float) -> None:
    features, labels = [torch.randn(8, 3), torch.randn(4, 3)], torch.zeros(8, dtype=torch.int64)
    features[part][1, 2] = value
    with pytest.raises(ValueError, match="not all finite"):
        knn_accuracy(features[0], labels, features[1], labels[:4], k=3)


def test_what_all_features_have_in_common_does_not_drown_what_tells_them_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 16, generator=generator)
    labels = torch.arange(500) % 5
    z = 100 + 0.01 * (0.5 * centres[labels] + torch.randn(500, 16, generator=generator))
    exact = F.normalize(z.double(), dim=1)
    similarity, nearest = (exact[250:] @ exact[:250].T).topk(10)
    votes = torch.zeros(250, 5, dtype=torch.float64)
    votes.scatter_add_(1, labels[:250][nearest], ((similarity - 1) / 0.07).exp())
    want = votes.argmax(dim=1) == labels[250:]
    right = knn_correct(z[:250], labels[:250], z[250:], labels[250:], (10,))[0]
    assert want.double().mean() > 0.6
    assert (right == want).double().mean() > 0.99

"""Collapse is built by hand, one kind at a time, from the pixels of real images."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastjepa.data.fashion_mnist import FashionMNIST
from fastjepa.evaluation import (
    CollapseSigns,
    between_image_std,
    collapse_warning,
    prediction_std,
    rankme,
    token_std,
)
from fastjepa.evaluation.collapse import RECOVERED, REPEATED, CollapseWatch

WIDTH = 64


@pytest.fixture(scope="module")
def healthy() -> Tensor:
    """Tokens [64, 49, WIDTH] that tell what they show: random features of real patches."""
    images = FashionMNIST(split="test").images[:64].float() / 255
    patches = torch.nn.functional.unfold(images, 4, stride=4).mT  # [64, 49, 16]
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(16, 256, generator=generator), torch.randn(256, WIDTH, generator=generator)
    # The phase keeps black patches, which are most of an image, from being all zero.
    phase = torch.rand(256, generator=generator)
    around = torch.nn.functional.avg_pool1d(patches.mT, 5, 1, 2, count_include_pad=False).mT
    return torch.cos((patches + around) @ first + phase) @ second / 16


@pytest.fixture(scope="module")
def positions() -> Tensor:
    """A position table [49, WIDTH]."""
    return 3 * torch.randn(49, WIDTH, generator=torch.Generator().manual_seed(1))


def signs(hidden: Tensor, prediction: Tensor | None = None) -> CollapseSigns:
    if prediction is None:
        prediction = torch.nn.functional.layer_norm(hidden, (WIDTH,))
    return CollapseSigns(
        target_std=token_std(hidden).item(),
        between_image_std=between_image_std(hidden).item(),
        token_rankme=rankme(hidden.flatten(0, 1)).item(),
        prediction_std=prediction_std(prediction).item(),
    )


def test_healthy_features_raise_no_warning(healthy: Tensor, positions: Tensor) -> None:
    start = signs(healthy + positions)
    assert collapse_warning(start, start) is None
    assert collapse_warning(signs(healthy), start) is None


def test_complete_collapse_is_seen(healthy: Tensor) -> None:
    collapsed = healthy.mean(dim=(0, 1)) + 0.01 * healthy
    found = signs(collapsed)
    assert found.target_std < 0.05
    assert "every token" in (collapse_warning(found, signs(healthy)) or "")


def test_tokens_that_only_tell_their_place_are_seen(healthy: Tensor, positions: Tensor) -> None:
    found = signs(positions + 0.01 * healthy)
    # Neither the deviation over tokens nor the rank gives it away.
    assert found.target_std > 0.9
    assert found.token_rankme > 0.9 * signs(healthy).token_rankme
    assert "their place" in (collapse_warning(found, signs(healthy)) or "")


def test_dimensional_collapse_is_seen(healthy: Tensor) -> None:
    few = healthy.flatten(0, 1).svd().V[:, 1:4]  # [WIDTH, 3]
    found = signs(healthy @ few @ few.T)
    start = signs(healthy)
    assert found.target_std > 0.5
    assert found.between_image_std > 0.5 * start.between_image_std
    assert "dimensional collapse" in (collapse_warning(found, start) or "")


def test_a_constant_predictor_is_seen(healthy: Tensor) -> None:
    start = signs(healthy)
    found = signs(healthy, prediction=torch.ones(4, 8, 6, WIDTH))
    assert "predictor" in (collapse_warning(found, start) or "")


def test_a_diverged_run_is_said_so(healthy: Tensor) -> None:
    found = signs(healthy * torch.nan)
    assert math.isnan(found.token_rankme)
    assert "not finite" in (collapse_warning(found, signs(healthy)) or "")


def test_rankme_is_the_formula_of_the_paper(healthy: Tensor) -> None:
    z = healthy.flatten(0, 1)
    singular = torch.linalg.svdvals(z.double())
    p = singular / singular.sum() + 1e-7
    assert rankme(z).item() == pytest.approx(torch.exp(-(p * p.log()).sum()).item(), rel=1e-6)


@settings(deadline=None)
@given(rank=st.integers(1, 12), scale=st.floats(1e-6, 1e6), rows=st.integers(12, 40))
def test_rankme_of_equal_directions_is_their_number(rank: int, scale: float, rows: int) -> None:
    z = torch.zeros(rows, 16)
    z[:rank, :rank] = scale * torch.eye(rank)
    assert rankme(z).item() == pytest.approx(rank, rel=1e-3)
    assert rankme(z.T).item() == pytest.approx(rank, rel=1e-3)


def test_rankme_of_nothing_is_one() -> None:
    assert rankme(torch.zeros(20, 8)).item() == pytest.approx(1, rel=1e-3)


def test_collapse_is_spoken_of_ever_less_often_and_when_it_is_over() -> None:
    watch = CollapseWatch()
    bad = [False, *[True] * 20, False, True, True, *[False] * 5, True]
    said = {step: watch.heed(step, "bad" if is_bad else None) for step, is_bad in enumerate(bad)}
    assert {step: text for step, text in said.items() if text} == {
        1: "step 1: bad",
        4: "step 4, and since step 1: bad",
        16: "step 16, and since step 1: bad",
        26: "step 26: no sign of collapse any more; there were some from step 1 to 23",
        29: "step 29: bad",
    }


@given(st.lists(st.booleans(), max_size=200))
def test_whatever_is_seen_of_collapse_is_told_and_briefly(bad: list[bool]) -> None:
    watch = CollapseWatch()
    said = [watch.heed(step, "bad" if is_bad else None) for step, is_bad in enumerate(bad)]
    for step, is_bad in enumerate(bad):
        if is_bad and not any(bad[:step]):
            assert said[step] == f"step {step}: bad"
    over = [step for step, text in enumerate(said) if text and "no sign" in text]
    assert all(not any(bad[step - RECOVERED + 1 : step + 1]) for step in over)
    assert watch.since is None or not over or watch.since > over[-1]
    begun = [step for step, text in enumerate(said) if text == f"step {step}: bad"]
    assert len(begun) - len(over) in (0, 1)
    told = sum(text is not None for text in said)
    assert told <= len(over) + sum(2 + math.log(1 + sum(bad), REPEATED) for _ in begun)


@settings(deadline=None)
@given(scale=st.floats(0.1, 100), seed=st.integers(0, 100))
def test_stds_do_not_depend_on_the_scale_of_tokens(scale: float, seed: int) -> None:
    hidden = torch.randn(6, 9, 32, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(token_std(hidden * scale), token_std(hidden), rtol=1e-2, atol=0)
    assert between_image_std(hidden) < token_std(hidden)  # a mean over tokens varies less than they do
    assert 0 < token_std(hidden) < 1.05

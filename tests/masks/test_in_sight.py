"""How much of what is to be predicted stands in the context."""

import pytest
import torch

from fastjepa.masks import MultiBlockMasks
from fastjepa.masks.in_sight import share_in_sight
from fastjepa.masks.multiblock import Mode


@pytest.mark.parametrize("mode", ["truncate", "budget", "packed"])
def test_all_is_hidden_where_there_is_room(mode: Mode) -> None:
    assert share_in_sight(MultiBlockMasks((14, 14), mode)) == 0


def test_it_is_what_counting_one_image_at_a_time_gives() -> None:
    sampler = MultiBlockMasks((7, 7), "budget", context_tokens=30)
    shares = []
    for step in range(16):
        masks = sampler.sample(torch.arange(64) + 64 * step, 0, step)
        for image, context in enumerate(masks.context):
            shares += torch.isin(masks.targets[:, image], context).flatten().tolist()
    assert share_in_sight(sampler) == pytest.approx(sum(shares) / len(shares))
    assert 0.04 < share_in_sight(sampler) < 0.1


def test_a_context_that_hardly_any_draw_has_shows_what_is_asked() -> None:
    assert share_in_sight(MultiBlockMasks((4, 4), "budget", context_tokens=14)) > 0.4
    assert share_in_sight(MultiBlockMasks((5, 5), "truncate")) > 0.4
    assert share_in_sight(MultiBlockMasks((5, 5), "packed")) == 0

"""What a learner says of its weights, and what it takes for that."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastjepa.config import load_config
from fastjepa.engine.build import build_model
from fastjepa.engine.learner import Learner, start_learner
from fastjepa.engine.processes.world import World


class Elements(TorchDispatchMode):
    """The most that one operation gives, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self.syncs = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
        self.syncs += func is torch.ops.aten._local_scalar_dense.default
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given:
                self.most = max(self.most, leaf.numel())
        return result


@pytest.fixture(scope="module")
def learner() -> Learner:
    config = load_config(
        None,
        [
            "model.size=free", "model.width=24", "model.depth=1", "model.heads=1", "model.patch_size=4",
            "model.predictor_width=16", "model.predictor_depth=1", "model.predictor_heads=2",
            "data.image_size=28", "data.channels=1", "data.mean=[0.286]", "data.std=[0.353]",
            "optim.global_batch=4", "optim.precision=fp32", "speed.device=cpu",
        ],
    )  # fmt: skip
    return start_learner(build_model(config), config, World(0, 1, torch.device("cpu"), None))


def test_looking_for_what_is_not_finite_takes_no_memory_and_no_wait(learner: Learner) -> None:
    assert max(p.master.numel() for p in learner.partitions) > 1000
    with Elements() as elements:
        found = learner.is_finite()
    assert elements.most < 20
    assert elements.syncs == 0
    assert found.shape == ()
    assert bool(found)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 77, -1])
def test_one_weight_that_is_not_finite_is_found(learner: Learner, value: float, place: int) -> None:
    for partition in learner.partitions:
        before = partition.master[place].clone()
        partition.master[place] = value
        assert not bool(learner.is_finite())
        partition.master[place] = before
    assert bool(learner.is_finite())
    largest = torch.finfo(torch.float32).max
    learner.partitions[0].master[0], before = largest, learner.partitions[0].master[0].clone()
    assert bool(learner.is_finite()), "large, and finite"
    learner.partitions[0].master[0] = before

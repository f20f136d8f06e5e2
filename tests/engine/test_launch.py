"""What DeepSpeed is told."""

import pytest

from fastjepa.config import load_config
from fastjepa.engine.launch import bucket_elements, deepspeed_config
from fastjepa.models import SIZES


@pytest.mark.parametrize("name", ["base", "large", "huge", "giant"])
def test_gradients_come_in_several_buckets_that_are_large_enough(name: str) -> None:
    size = SIZES[name]
    encoder = 12 * size.depth * size.width**2  # nearly
    assert encoder / bucket_elements(size.width) >= 3
    assert 2 * bucket_elements(size.width) > 25e6, "bytes in bf16, below which a network's rate falls off"


@pytest.mark.parametrize(
    ("stage", "on_gpu", "overlaps"), [(0, True, False), (1, True, True), (2, False, False)]
)
def test_reduction_overlaps_where_there_are_streams(stage: int, on_gpu: bool, overlaps: bool) -> None:
    config = load_config(None, [f"speed.zero_stage={stage}", "model.size=base"])
    told = deepspeed_config(config, 2, on_gpu)["zero_optimization"]
    assert told["overlap_comm"] is overlaps
    assert told["reduce_bucket_size"] == told["allgather_bucket_size"] == bucket_elements(768)


def test_gradients_of_a_graph_are_reduced_before_it_is_replayed() -> None:
    config = load_config(None, ["speed.zero_stage=1", "model.size=base", "speed.cuda_graph=parts"])
    assert deepspeed_config(config, 2, on_gpu=True)["zero_optimization"]["overlap_comm"] is False


def test_the_file_has_the_last_word() -> None:
    config = load_config(None, ["speed.zero_stage=1", "deepspeed.zero_optimization.reduce_bucket_size=7"])
    told = deepspeed_config(config, 1)["zero_optimization"]
    assert told["reduce_bucket_size"] == 7
    assert told["stage"] == 1

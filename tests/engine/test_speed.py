"""What is refused before anything is written, because these processes and devices cannot do it."""

from typing import Any, cast

import pytest
import torch

from fastjepa.config import Config, ConfigError, load_config, parse_config
from fastjepa.engine.build import build_model
from fastjepa.engine.learner import Learner, how_it_runs
from fastjepa.engine.processes.world import World
from fastjepa.engine.single import SingleDevice
from fastjepa.engine.speed import check_speed, cuda_graph_of

FP32 = {"optim": {"precision": "fp32"}}
MAE = {"objective": {"name": "mae"}}


def world(size: int = 1, device: str = "cuda") -> World:
    return World(0, size, torch.device(device), cast(Any, None))


def config_of(*parts: dict[str, Any], **speed: Any) -> Config:
    merged: dict[str, Any] = {"speed": speed}
    for part in parts:
        merged |= part
    return parse_config(merged)


@pytest.fixture(autouse=True)
def no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTJEPA_DEBUG", raising=False)


@pytest.mark.parametrize("stage", [0, 1])
def test_parts_under_deepspeed_would_lose_fp32_gradients_of_micro_batches(stage: int) -> None:
    config = config_of(FP32, cuda_graph="parts", accumulation=4, zero_stage=stage)
    said = "parts under DeepSpeed in fp32 would lose .* use speed.accumulation 1, optim.precision bf16, or "
    with pytest.raises(ConfigError, match=said):
        check_speed(config, world(2))
    config.speed.accumulation = 1
    check_speed(config, world(2))
    config.speed.accumulation, config.optim.precision = 4, "bf16"
    check_speed(config, world(2))


def test_parts_on_one_device_copy_gradients_out_and_may_accumulate() -> None:
    check_speed(config_of(FP32, cuda_graph="parts", accumulation=4), world(1))
    with pytest.raises(ConfigError, match="parts under DeepSpeed"):
        check_speed(config_of(FP32, cuda_graph="parts", accumulation=4, zero_stage=1), world(1))


def test_a_debugged_run_captures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = config_of()
    assert cuda_graph_of(auto, world()) == "step"
    monkeypatch.setenv("FASTJEPA_DEBUG", "1")
    assert cuda_graph_of(auto, world()) == "none"
    check_speed(auto, world())
    for kind in ("step", "parts"):
        with pytest.raises(ConfigError, match=f"{kind} cannot capture what FASTJEPA_DEBUG=1 does.*use none"):
            check_speed(config_of(cuda_graph=kind), world())


@pytest.mark.parametrize(
    ("speed", "size"),
    [({"accumulation": 2}, 1), ({"checkpoint_blocks": True}, 1), ({"compile": True}, 1), ({}, 2)],
)
def test_auto_captures_what_one_graph_can_hold(speed: dict[str, Any], size: int) -> None:
    assert cuda_graph_of(config_of(**speed), world(size)) == "none"


@pytest.mark.parametrize(
    ("parts", "instead"),
    [([], "parts or none"), ([MAE], "none"), ([{"masks": {"mode": "truncate"}}], "none")],
)
def test_advice_on_several_ranks_leads_to_no_other_error(parts: list[dict[str, Any]], instead: str) -> None:
    config = config_of(*parts, cuda_graph="step")
    with pytest.raises(ConfigError, match=f"this is one of 2 at stage auto: use {instead}$"):
        check_speed(config, world(2))
    for kind in instead.split(" or "):
        check_speed(config_of(*parts, cuda_graph=kind), world(2))


@pytest.mark.parametrize(
    ("parts", "speed", "device", "said"),
    [
        ([], {"target_stream": True}, "cpu", "target_stream needs a GPU: there are no streams on the CPU"),
        ([FP32], {"target_precision": "fp8"}, "cuda", "target_precision fp8 needs optim.precision bf16"),
        ([FP32], {"target_precision": "bf16"}, "cpu", "target_precision bf16 needs optim.precision bf16"),
        (
            [MAE],
            {"target_precision": "fp8"},
            "cuda",
            "speed.target_precision is for the target encoder, and ",
        ),
        ([MAE], {"target_stream": True}, "cuda", "speed.target_stream is for .* objective.name mae has none"),
    ],
)
def test_what_the_target_encoder_cannot_do(
    parts: list[dict[str, Any]], speed: dict[str, Any], device: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check_speed(config_of(*parts, **speed), world(device=device))


@pytest.mark.parametrize(
    ("engine", "graph", "buckets", "size", "said"),
    [
        (
            SingleDevice,
            "step",
            False,
            1,
            "Runs alone, without DeepSpeed, on a GPU; a CUDA graph of the whole step; ",
        ),
        (
            SingleDevice,
            "step",
            True,
            1,
            "a CUDA graph of the whole step for each shape of masks; the target ",
        ),
        (
            object,
            "parts",
            False,
            8,
            "under DeepSpeed, ZeRO stage 2, 8 ranks on GPUs; CUDA graphs of the networks;",
        ),
        (
            object,
            "none",
            False,
            1,
            "ZeRO stage 2, one rank on a GPU; no CUDA graph; the target encoder in bf16",
        ),
    ],
)
def test_a_run_says_how_it_runs(engine: type, graph: Any, buckets: bool, size: int, said: str) -> None:
    model = build_model(config_of({"model": {"size": "tiny"}, "data": {"image_size": 64}}))
    learner = Learner(model, object.__new__(engine), [], None, cuda_graph=graph, buckets=buckets)
    assert said in how_it_runs(learner, config_of(), world(size))


@pytest.mark.parametrize(
    ("speed", "said"),
    [
        (
            {"compile": True},
            "speed.compile true needs whole networks, and at speed.zero_stage 3 each block's",
        ),
        ({"cuda_graph": "parts"}, "cuda_graph parts needs whole networks"),
        ({"target_precision": "fp8"}, "target_precision fp8 needs whole networks.*use a lower stage"),
        (
            {"cuda_graph": "step"},
            "step needs speed.zero_stage 0 on one device, got stage 3: .*cuda_graph none$",
        ),
    ],
)
def test_stage_3_has_no_whole_network(speed: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_speed(config_of(**speed, zero_stage=3), world(2))


def test_offload_is_of_what_zero_cuts() -> None:
    said = "offload_optimizer keeps on the host what ZeRO cuts, .* use speed.zero_stage 1, 2 or 3"
    for stage, size in ((0, 2), ("auto", 1)):
        with pytest.raises(ConfigError, match=said):
            check_speed(config_of(offload_optimizer=True, zero_stage=stage), world(size))
    for stage, size in (("auto", 2), (1, 1), (2, 2), (3, 1)):
        check_speed(config_of(offload_optimizer=True, zero_stage=stage), world(size))


def test_every_default_passes() -> None:
    for size, device in ((1, "cpu"), (1, "cuda"), (8, "cuda")):
        check_speed(load_config(None), world(size, device))

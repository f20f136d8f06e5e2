"""What fits and what it takes: arithmetic that must hold whatever the numbers, and plans of real recipes."""

from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjepa.config import Config, ConfigError, load_config
from fastjepa.engine.build import build_masks, build_shape
from fastjepa.masks import MultiBlockMasks, RandomMasks
from fastjepa.models import Predictor, VisionTransformer
from fastjepa.planning.fit import Parts, divisors, largest_that_fits, on_host, parts_of
from fastjepa.planning.memory import STAGES, Memory, State, Step
from fastjepa.planning.networks import network_of
from fastjepa.planning.plan import Device, DoesNotFit, Fit, Plan, chosen_fit, largest_fit, make_plan
from fastjepa.planning.tokens import draws_of, seen_in
from fastjepa.planning.work import Work, image_flop, pace

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
IMAGES = 1_281_167
H100 = Device(80e9, 989e12, 0.35)

size = st.floats(0, 1e12)
memories = st.builds(
    Memory,
    st.builds(State, *[size] * 7),
    st.builds(Step, size, size, size, size, st.booleans(), st.booleans()),
    size,
    size,
    size,
)


@cache
def recipe(name: str, *overrides: str) -> Config:
    return load_config(CONFIGS / f"{name}.yaml", overrides, needs_data=False)


def planned(config: Config, gpus: int = 8, device: Device = H100) -> Plan:
    return make_plan(config, gpus, device, IMAGES, 220)


def with_memory(memory: float) -> Device:
    return replace(H100, memory=memory)


@given(memories)
def test_parts_are_the_peak(memory: Memory) -> None:
    assert parts_of(memory).total == pytest.approx(memory.peak)
    left, moved = on_host(memory)
    assert left.peak + moved == pytest.approx(memory.peak)
    assert left.state.master + left.state.moments + left.state.shadow == 0


@given(st.integers(1, 1 << 20))
def test_divisors(number: int) -> None:
    found = divisors(number)
    assert (found[0], found[-1]) == (1, number)
    assert found == sorted(set(found))
    assert all(number % each == 0 for each in found)
    assert len(found) == 1 or number // found[1] == found[-2]


@given(st.dictionaries(st.integers(1, 1000), size, min_size=1), size, size)
def test_what_fits_fits_and_more_room_is_never_less(peaks: dict[int, float], a: float, b: float) -> None:
    """However the peaks lie."""
    sizes, peak_of = set(peaks), peaks.__getitem__

    little, much = (largest_that_fits(sizes, peak_of, room) or 0 for room in sorted((a, b)))
    assert little <= much
    larger = sorted(each for each in sizes if each > little)
    assert little == 0 or peak_of(little) <= min(a, b)
    assert not larger or peak_of(larger[0]) > min(a, b)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(("vit_small_16", "vit_large_16_mae")),
    st.sampled_from((1, 2, 8)),
    st.floats(4e9, 40e9),
    st.floats(1, 3),
)
def test_of_real_recipes_too(name: str, gpus: int, memory: float, times: float) -> None:
    config = recipe(name)
    sampler = masks_of(name)
    for stage in STAGES if gpus > 1 else (0,):
        device = with_memory(memory)
        fit = largest_fit(config, gpus, stage, device, sampler)
        more = largest_fit(config, gpus, stage, with_memory(memory * times), sampler)
        assert fit.fits == (fit.parts.total <= device.room)
        assert fit.images * fit.accumulation * gpus == config.optim.global_batch
        assert more.images >= fit.images
        assert more.fits or not fit.fits
        larger = [each for each in divisors(config.optim.global_batch // gpus) if each > fit.images]
        if fit.fits and larger and stage:
            tight = with_memory(fit.parts.total / device.usable)
            assert largest_fit(config, gpus, stage, tight, sampler).images == fit.images
            looser = with_memory(1e15)
            assert largest_fit(config, gpus, stage, looser, sampler).images == larger[-1]


@cache
def masks_of(name: str) -> MultiBlockMasks | RandomMasks:
    return build_masks(recipe(name))


def test_the_parts_are_those_of_the_model() -> None:
    """Of one GPU without DeepSpeed: 2 bytes of weights, 12 of state, 4 and 2 of the target, a parameter."""
    config = recipe("vit_base_16", "speed.accumulation=4")
    parts = planned(config, gpus=1).chosen.parts
    with torch.device("meta"):
        encoder = sum(p.numel() for p in VisionTransformer(build_shape(config)).parameters())
        predictor = sum(p.numel() for p in Predictor((14, 14), 768, 384, 6, 12).parameters())
    trained = encoder + predictor
    assert parts.weights == pytest.approx(2 * trained, rel=1e-3)
    assert parts.optimizer == pytest.approx(12 * trained, rel=1e-3)
    assert parts.shadow == pytest.approx(4 * encoder, rel=1e-3)
    assert parts.target == pytest.approx(2 * encoder, rel=1e-3)
    mae = planned(recipe("vit_base_16_mae"), gpus=1).chosen.parts
    assert (mae.shadow, mae.target) == (0, 0)


def test_sums_of_micro_batches_take_memory() -> None:
    config = recipe("vit_large_16")
    sampler = masks_of("vit_large_16")
    tight = largest_fit(config, 1, 0, with_memory(50e9), sampler)
    whole = largest_fit(config, 1, 0, with_memory(1e15), sampler)
    assert (whole.accumulation, tight.accumulation > 1) == (1, True)
    parameters = network_of(config).parameters
    assert tight.parts.gradients - whole.parts.gradients == pytest.approx(4 * parameters, rel=1e-3)


def test_auto_is_the_stage_that_a_run_takes() -> None:
    config = recipe("ijepa_vit_huge_14", "speed.checkpoint_blocks=false")
    assert planned(config, gpus=16).stage == 2
    accumulating = planned(config, gpus=8, device=with_memory(40e9))
    assert (accumulating.stage, accumulating.chosen.accumulation > 1) == (1, True)
    assert planned(recipe("vit_base_16", "speed.zero_stage=3")).stage == 3
    assert planned(config, gpus=1).stage == 0
    assert planned(recipe("vit_small_16", "deepspeed.dump_state=true"), gpus=1).stage == 2


def test_gradients_in_bf16_are_not_summed() -> None:
    fit = planned(recipe("vit_large_16"), device=with_memory(24e9)).fits[0]
    assert (fit.images, fit.accumulation, fit.fits) == (256, 1, False)


def test_offloaded_state_is_on_the_host() -> None:
    here = planned(recipe("vit_large_16", "speed.zero_stage=1"))
    there = planned(recipe("vit_large_16", "speed.zero_stage=1", "speed.offload_optimizer=true"))
    assert 0 not in there.fits
    moved = here.chosen.parts.optimizer + here.chosen.parts.shadow
    assert there.chosen.host == moved
    assert there.chosen.parts.total == pytest.approx(here.chosen.parts.total - moved)


def test_as_configured() -> None:
    config = recipe("ijepa_vit_huge_14")
    fit = planned(config).configured
    assert fit is not None
    assert (fit.images, fit.accumulation, fit.stage) == (256, 1, 2)
    assert planned(recipe("ijepa_vit_huge_14", "speed.accumulation=3")).configured is None
    assert planned(recipe("vit_base_16", "speed.accumulation=2", "speed.zero_stage=0")).configured is None


@pytest.mark.parametrize(
    ("name", "overrides", "gpus", "memory", "said"),
    [
        ("vit_base_16", (), 3, 80e9, "optim.global_batch 2048 does not divide into 3 ranks x 1"),
        (
            "fashion_mnist",
            (),
            1,
            80e9,
            "planned for optim.precision bf16, got fp32: give optim.precision=bf16",
        ),
        ("vit_base_16", ("speed.offload_optimizer=true",), 1, 80e9, "use speed.zero_stage 1, 2 or 3"),
        ("vit_base_16", ("model.heads=7",), 1, 80e9, "heads"),
        ("vit_base_16", ("optim.epochs=1",), 8, 80e9, "warm"),
        ("ijepa_vit_giant_16", (), 1, 16e9, "No setting helps: it needs more GPUs, or larger ones"),
        ("ijepa_vit_huge_14", (), 8, 8e9, "Try speed.zero_stage=2 speed.offload_optimizer=true ("),
        ("vit_large_16", ("speed.zero_stage=0",), 8, 12e9, "a micro-batch of 256 at ZeRO 0 needs"),
    ],
)
def test_refusals(name: str, overrides: tuple[str, ...], gpus: int, memory: float, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(recipe(name, *overrides), gpus, with_memory(memory))
    assert said in str(caught.value)


def test_what_is_said_to_help_does() -> None:
    config, device = recipe("ijepa_vit_huge_14"), with_memory(8e9)
    with pytest.raises(DoesNotFit) as caught:
        planned(config, 8, device)
    tries = str(caught.value).partition("Try ")[2].split(", or ")
    assert len(tries) == 3
    for each in tries:
        settings, _, promised = each.partition(" (")
        fit = planned(recipe("ijepa_vit_huge_14", *settings.split()), 8, device).chosen
        assert promised.startswith(f"{fit.images} would take {fit.parts.total / 1e9:.2f} GB")


# Useful GFLOP of an image: forward and backward three times forward, the target forward only.
@pytest.mark.parametrize(
    ("name", "context", "target", "head"),
    [
        ("vit_base_16", None, 34.9, None),
        ("vit_large_16", None, 122.5, None),
        ("ijepa_vit_huge_14", 260.9, 333.2, 61.0),
    ],
)
def test_flops_are_those_known(name: str, context: float | None, target: float, head: float | None) -> None:
    config = recipe(name)
    sampler = masks_of(name)
    flop = image_flop(network_of(config), seen_in(sampler, 128))
    assert flop["target encoder"] + flop["target patch embedding"] == pytest.approx(target * 1e9, rel=0.01)
    # Of another run of draws: contexts and blocks vary.
    if context is not None and head is not None:
        assert flop["context encoder"] == pytest.approx(context * 1e9, rel=0.06)
        assert flop["predictor"] == pytest.approx(head * 1e9, rel=0.06)


@pytest.mark.parametrize(("name", "gflop"), [("vit_base_16", 58.7), ("vit_large_16", 124.5)])
def test_flops_of_mae(name: str, gflop: float) -> None:
    config = recipe(f"{name}_mae")
    flop = image_flop(network_of(config), seen_in(build_masks(config), 1))
    assert sum(flop.values()) == pytest.approx(gflop * 1e9, rel=0.02)


rates = st.floats(1e9, 1e15)


@given(st.floats(1e6, 1e13), st.integers(1, 1 << 31), st.integers(1, 4096), rates, st.floats(1, 1e5))
def test_pace(flop: float, images: int, gpus: int, flop_per_s: float, per_core: float) -> None:
    work = Work({"a": flop, "b": 2 * flop}, images)
    one, all_of_them = (pace(work, n, flop_per_s, per_core) for n in (1, gpus))
    assert all_of_them.images_per_second == pytest.approx(gpus * one.images_per_second)
    assert all_of_them.hours * 3600 * all_of_them.images_per_second == pytest.approx(images)
    assert (all_of_them.cores - 1) * per_core < all_of_them.images_per_second * (1 + 1e-9)
    assert all_of_them.cores * per_core >= all_of_them.images_per_second * (1 - 1e-9)


def test_packed_contexts_count_by_their_mean() -> None:
    packed = replace(MultiBlockMasks(grid=(14, 14)), mode="packed")
    assert seen_in(packed, 64).context > seen_in(replace(packed, mode="truncate"), 64).context
    assert len(draws_of(replace(packed, mode="budget"), 64)) == 1
    [seen] = draws_of(RandomMasks((14, 14)), 64)
    assert (seen.context, seen.target, seen.blocks) == (49, 147, 1)


def test_a_plan_says_all_of_its_parts() -> None:
    plan = planned(recipe("vit_base_16"))
    assert isinstance(plan.chosen, Fit)
    assert plan.chosen == chosen_fit(plan.config, 8, H100, masks_of("vit_base_16"))
    assert sum(getattr(plan.chosen.parts, f.name) for f in fields(Parts)) == plan.chosen.parts.total
    assert plan.work.images == 300 * (IMAGES // 2048) * 2048

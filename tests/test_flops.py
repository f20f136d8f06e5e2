"""FLOPs from shapes, held to what torch counts in real steps of the engine, and to known numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from bench.throughput import ours
from bench.throughput.setting import Inputs, Setting, tokens_of
from fastjepa.masks import Masks
from fastjepa.models import SIZES, ViTShape
from fastjepa.models.flops import Narrow, Skipped, Tokens, executed, ijepa, mae, useful

CPU = torch.device("cpu")
TOY = Setting("toy", batch=3, device=CPU, precision="fp32", mae_precision="fp32")


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return Inputs(TOY)


def counted(inputs: Inputs, *overrides: str) -> tuple[int, Masks]:
    """What torch counts in a step of a real learner, and the masks of the step."""
    config = TOY.config("speed.kernels=torch", *overrides)
    learner, batches = ours.learner_of(config, CPU), ours.batches_of(config, inputs)
    with FlopCounterMode(display=False) as counter:
        learner.step(batches[:1], ours.RATES)
    return counter.get_total_flops(), batches[0].masks


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("mode", ["truncate", "budget", "packed"])
def test_a_step_of_ijepa_is_counted_to_the_last_product(
    inputs: Inputs, mode: str, skip: bool, fused: bool
) -> None:
    flop, masks = counted(
        inputs,
        f"masks.mode={mode}",
        f"speed.skip_dead_work={str(skip).lower()}",
        f"speed.fused_blocks={str(fused).lower()}",
    )
    skipped = Skipped(masks.asked_rows.numel()) if skip and masks.asked_rows is not None else None
    predictor = Narrow(*TOY.predictor[:2])
    parts = ijepa(TOY.shape(), predictor, tokens_of(masks), skipped)
    assert flop == executed(parts)
    if skip:
        assert flop < executed(ijepa(TOY.shape(), predictor, tokens_of(masks)))


def test_a_step_of_mae_is_counted_to_the_last_product(inputs: Inputs) -> None:
    flop, masks = counted(inputs, "objective.name=mae")
    decoder = Narrow(*TOY.decoder[:2])
    assert flop == executed(mae(TOY.shape(class_token=True), decoder, TOY.batch, masks.context.shape[1]))


# The table of the design, from masks measured on the published sampler: context tokens after the cut at a
# batch of 128 and without it, tokens of a target block. It is rounded, and made of means.
@pytest.mark.parametrize(
    ("size", "patch", "cut", "whole", "target", "truncate", "packed", "of_mae"),
    [
        ("base", 16, 50.8, 81.7, 33.3, 84.1, 109.0, 58.7),
        ("large", 16, 50.8, 81.7, 33.3, 260.7, 335.4, 124.5),
        ("huge", 14, 68.5, 110.1, 44.2, 655.9, 841.2, 291.4),
    ],
)
def test_the_known_sizes_take_what_is_known(
    size: str,
    patch: int,
    cut: float,
    whole: float,
    target: float,
    truncate: float,
    packed: float,
    of_mae: float,
) -> None:
    named = SIZES[size]
    shape = ViTShape((224, 224), patch, named.width, named.depth, named.heads)
    predictor = Narrow(named.predictor_width, named.predictor_depth)
    patches = shape.grid[0] * shape.grid[1]
    for context, known in ((cut, truncate), (whole, packed)):
        assert useful(ijepa(shape, predictor, Tokens([context], target))) / 1e9 == pytest.approx(
            known, rel=0.01
        )
    assert useful(mae(shape, Narrow(512, 8), 1, patches // 4)) / 1e9 == pytest.approx(of_mae, rel=0.01)


SHAPES = st.builds(
    lambda grid, patch, width, depth: ViTShape(
        (grid[0] * patch, grid[1] * patch), patch, 8 * width, depth, 1
    ),
    st.tuples(st.integers(1, 8), st.integers(1, 8)),
    st.integers(1, 16),
    st.integers(1, 8),
    st.integers(1, 4),
)
NARROW = st.builds(Narrow, st.integers(1, 8).map(lambda n: 8 * n), st.integers(1, 3))
CONTEXTS = st.lists(st.integers(1, 60), min_size=1, max_size=5)


@given(SHAPES, NARROW, CONTEXTS, st.integers(1, 20), st.integers(1, 5))
def test_images_add_up(
    shape: ViTShape, predictor: Narrow, contexts: list[int], target: int, blocks: int
) -> None:
    together = ijepa(shape, predictor, Tokens(contexts, target, blocks))
    apart = [ijepa(shape, predictor, Tokens([context], target, blocks)) for context in contexts]
    for name, part in together.items():
        assert part.forward == sum(each[name].forward for each in apart)
        assert part.backward == sum(each[name].backward for each in apart)


@given(SHAPES, NARROW, CONTEXTS, st.integers(1, 20), st.integers(1, 5), st.floats(0, 1))
def test_dead_work_is_never_negative_and_target_rows_are_all_of_it(
    shape: ViTShape, predictor: Narrow, contexts: list[int], target: int, blocks: int, share: float
) -> None:
    tokens = Tokens(contexts, target, blocks)
    full = ijepa(shape, predictor, tokens)
    every = len(contexts) * shape.grid[0] * shape.grid[1]
    some = ijepa(shape, predictor, tokens, Skipped(share * every))
    for name, part in some.items():
        assert 0 <= part.forward <= full[name].forward
        assert 0 <= part.backward <= full[name].backward
    # The queries, keys and values of the first predictor block: once instead of M times.
    all_rows = ijepa(shape, predictor, tokens, Skipped(every))
    assert all_rows["target encoder"] == full["target encoder"]
    if blocks > 1:
        assert all_rows["predictor"].forward < full["predictor"].forward


@given(SHAPES, NARROW, CONTEXTS, st.integers(1, 20))
def test_useful_work_does_not_count_a_score_twice(
    shape: ViTShape, predictor: Narrow, contexts: list[int], target: int
) -> None:
    """Backward of attention computes scores again, and the patch embedding has no gradient of its input."""
    parts = ijepa(shape, predictor, Tokens(contexts, target))
    for name in ("context encoder", "predictor"):
        assert 2 * parts[name].forward <= parts[name].backward <= 2.5 * parts[name].forward
    assert parts["patch embedding"].backward == parts["patch embedding"].forward
    assert parts["target encoder"].backward == parts["target patch embedding"].backward == 0
    assert useful(parts) == sum(
        parts[name].forward * times
        for name, times in (
            ("patch embedding", 3),
            ("context encoder", 3),
            ("predictor", 3),
            ("target encoder", 1),
            ("target patch embedding", 1),
        )
    )

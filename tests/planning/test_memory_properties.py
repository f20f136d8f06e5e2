"""What must be so of a rank's memory whatever its numbers."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.scale_model.networks import named_network
from fastjepa.models import SIZES
from fastjepa.planning.activations import Kept, forward_bytes
from fastjepa.planning.memory import BF16, FP32, STAGES, Split, State, gathered, padded, part, state, step
from fastjepa.planning.networks import Group
from fastjepa.planning.tokens import Seen, Tokens

numels = st.lists(st.integers(1, 1 << 22), min_size=1, max_size=6).map(tuple)
groups = st.builds(lambda encoder, other: (Group(encoder, True), Group(other, False)), numels, numels)
ranks = st.integers(1, 4096)


def cut(found: State) -> float:
    """Of what ZeRO cuts at some stage, but for gradients, without which a step can begin."""
    return found.weights + found.master + found.moments + found.shadow + found.target


def padding(cut_groups: tuple[Group, ...], stage: int, n: int) -> float:
    """Bytes of a rank that are there only so that parts are equal, or a bound of them."""
    whole = sum(padded(group, stage, n) - group.numel for group in cut_groups)
    return (BF16 + 3 * FP32 + FP32 + BF16) * whole


@given(groups, ranks, st.sampled_from(STAGES))
def test_parts_make_up_the_whole(cut_groups: tuple[Group, ...], n: int, stage: int) -> None:
    for group in cut_groups:
        whole = padded(group, stage, n)
        assert part(group, stage, n) * (n if stage else 1) == whole >= group.numel
        most = {0: 64 * len(group.numels), 1: 2 * n, 2: 2 * n, 3: n * len(group.numels)}[stage]
        assert whole - group.numel < most


@given(groups, ranks, ranks, st.sampled_from((1, 2, 3)))
def test_more_ranks_take_no_more_of_each(cut_groups: tuple[Group, ...], a: int, b: int, stage: int) -> None:
    few, many = (state(cut_groups, Split(stage, n, 1000), 0, 0) for n in sorted((a, b)))
    assert many.master + many.moments + many.shadow <= few.master + few.moments + few.shadow
    assert many.total <= few.total + padding(cut_groups, stage, max(a, b))


@given(groups, ranks)
def test_a_higher_stage_takes_no_more_of_what_is_cut(cut_groups: tuple[Group, ...], n: int) -> None:
    found = [cut(state(cut_groups, Split(stage, n, 1000), 0, 0)) for stage in STAGES]
    for stage in (1, 2, 3):
        assert found[stage] <= found[stage - 1] + padding(cut_groups, stage, n)


@pytest.mark.parametrize("name", ["base", "large", "huge", "giant"])
@pytest.mark.parametrize("n", [8, 64, 4096])
def test_from_one_node_on_a_higher_stage_holds_less(name: str, n: int) -> None:
    network = named_network(name, 16)
    block = network.block_parameters
    outside = network.encoder_parameters - network.shape.depth * block
    bucket = 48 * network.shape.width**2
    totals = [state(network.groups, Split(stage, n, bucket), block, outside).total for stage in STAGES]
    assert totals == sorted(totals, reverse=True)


def test_on_few_ranks_it_holds_more() -> None:
    """Of gradients: stage 1 always has all of them in fp32, stage 0 none between steps; stage 3 its part."""
    network = (Group((1 << 20,), True), Group((1 << 20,), False))
    alone = [state(network, Split(stage, 1, 0), 0, 0).total for stage in STAGES]
    assert alone[1] > alone[0]
    two = [state(network, Split(stage, 2, 0), 0, 0).total for stage in STAGES]
    assert two[3] > 0.9 * two[2]


@given(st.integers(1, 1 << 31), ranks, st.integers(1, 1 << 28), st.integers(0, 1 << 31))
def test_what_is_gathered_is_no_more_than_the_network(numel: int, n: int, bucket: int, reuse: int) -> None:
    block = bucket // 4
    found = gathered(numel, Split(3, n, bucket, reuse), block)
    assert 0 <= found <= numel + block
    assert found == 0 if n == 1 else found >= min(numel, bucket)


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_those_of_the_blocks_and_a_rest(name: str) -> None:
    network = named_network(name, 16)
    width, outside = network.shape.width, 3 * 256 + 1 + 2  # patch embedding and the final norm
    expected = network.shape.depth * network.block_parameters + outside * width
    assert network.encoder_parameters == expected


@given(st.integers(1, 64), st.floats(20, 90), st.floats(10, 40))
def test_activations_grow_with_images(images: int, context: float, target: float) -> None:
    network, seen = named_network("small", 16), Seen(context, target, 4 * target)
    every = [Kept(remade, checkpointed) for remade in (True, False) for checkpointed in (True, False)]
    for kept in every:
        one = forward_bytes(network, Tokens(1, seen), kept)
        assert forward_bytes(network, Tokens(images, seen), kept) == pytest.approx(images * one)
    checkpointed, remade, _, all_kept = (forward_bytes(network, Tokens(1, seen), kept) for kept in every)
    assert checkpointed < remade < all_kept


def test_a_block_keeps_ten_numbers_of_a_token_and_width() -> None:
    network = named_network("base", 16)
    seen, deeper = Seen(50, 30, 90), replace(network.shape, depth=network.shape.depth + 1)
    more = replace(network, shape=deeper)
    rows, width, heads = 50, 768, 12
    for kept, numbers in ((Kept(remade=True), 10), (Kept(remade=False), 16), (Kept(checkpointed=True), 2)):
        added = forward_bytes(more, Tokens(1, seen), kept) - forward_bytes(network, Tokens(1, seen), kept)
        statistics = 0 if kept.checkpointed else 4 * (4 + heads) * rows
        assert added == pytest.approx(2 * numbers * rows * width + statistics)


def test_a_step_of_an_unknown_stage_is_refused() -> None:
    with pytest.raises(ValueError, match="0 to 3"):
        step((Group((1,), True),), Split(4, 8, 1), 1)

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjepa.data import order as order_module
from fastjepa.data.order import GlobalOrder, rank_slice
from fastjepa.masks.counter import Stream

# A run on a folder, or on images in memory, that was begun before there were shards goes on with these.
FOLDER_ORDER = [[6, 1, 9, 4, 0], [8, 2, 5, 7, 3]]


@st.composite
def orders(draw: st.DrawFn) -> GlobalOrder:
    images = draw(st.integers(1, 300))
    return GlobalOrder(images, draw(st.integers(1, images)), draw(st.integers(0, 2**63)), draw(st.booleans()))


@settings(deadline=None)
@given(orders(), st.integers(0, 5))
def test_each_image_comes_at_most_once_in_an_epoch(order: GlobalOrder, epoch: int) -> None:
    first = epoch * order.steps_per_epoch
    batches = [order.batch(step) for step in range(first, first + order.steps_per_epoch)]
    assert {batch_epoch for batch_epoch, _ in batches} == {epoch}
    indices = torch.cat([batch for _, batch in batches])
    assert len(indices) == order.steps_per_epoch * order.global_batch
    assert len(indices.unique()) == len(indices)
    assert 0 <= int(indices.min()) <= int(indices.max()) < order.images
    assert order.images - len(indices) < order.global_batch


@settings(deadline=None)
@given(orders(), st.lists(st.integers(0, 10_000), min_size=1, max_size=5))
def test_a_step_has_its_images_wherever_one_starts(order: GlobalOrder, steps: list[int]) -> None:
    straight = {step: order.batch(step)[1] for step in sorted(steps)}
    for step in steps:
        assert torch.equal(order.batch(step)[1], straight[step])


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 100))
def test_ranks_and_micro_batches_share_a_step_out(
    world_size: int, accumulation: int, micro_batch: int, step: int
) -> None:
    batch = world_size * accumulation * micro_batch
    _, indices = GlobalOrder(3 * batch, batch, 0).batch(step)
    parts = [rank_slice(indices, rank, world_size, accumulation) for rank in range(world_size)]
    assert all(part.shape == (accumulation, micro_batch) for part in parts)
    assert sorted(torch.cat(parts).flatten().tolist()) == sorted(indices.tolist())
    # The same micro-batches, whoever has them: `truncate` cuts to the minimum of one.
    one_rank = rank_slice(indices, 0, 1, world_size * accumulation).tolist()
    assert sorted(row for part in parts for row in part.tolist()) == sorted(one_rank)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    order = GlobalOrder(1000, 1000, seed=1)
    first = order.batch(0)[1]
    assert not torch.equal(first, order.batch(1)[1])
    assert not torch.equal(first, GlobalOrder(1000, 1000, seed=2).batch(0)[1])
    assert not torch.equal(first, torch.arange(1000))


def test_the_order_is_the_one_it_always_was() -> None:
    # Another one would change every run that resumes.
    assert GlobalOrder(10, 10, seed=0).batch(0)[1].tolist() == [8, 1, 9, 0, 5, 6, 4, 3, 2, 7]


def test_places_are_uniform() -> None:
    # Where image 0 of 8 comes in 800 epochs: 100 times at each place, give or take 9.
    order = GlobalOrder(8, 8, seed=0)
    places = torch.stack([(order.batch(epoch)[1] == 0).nonzero()[0, 0] for epoch in range(800)])
    assert ((places.bincount(minlength=8) - 100).abs() < 45).all()


def test_without_shuffling_the_set_comes_in_its_order() -> None:
    order = GlobalOrder(10, 4, seed=0, shuffle=False)
    assert [order.batch(step)[1].tolist() for step in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]
    assert order.batch(2)[0] == 1


def test_writing_into_a_batch_leaves_the_order_alone() -> None:
    order = GlobalOrder(10, 5, seed=0)
    before = order.batch(0)[1].clone()
    order.batch(0)[1].zero_()
    assert torch.equal(order.batch(0)[1], before)


@pytest.mark.parametrize("batch", [0, 11])
def test_a_batch_larger_than_the_set_is_refused(batch: int) -> None:
    with pytest.raises(ValueError, match=f"a global batch of {batch} cannot be drawn from 10 images"):
        GlobalOrder(10, batch, seed=0)


@pytest.mark.parametrize(
    ("batch", "world_size", "accumulation", "nearest"), [(100, 3, 2, "96 or 102"), (5, 4, 2, "is 8")]
)
def test_a_batch_that_does_not_divide_names_the_nearest_that_does(
    batch: int, world_size: int, accumulation: int, nearest: str
) -> None:
    with pytest.raises(ValueError, match=f"{batch} does not divide into {world_size} ranks .*{nearest}"):
        rank_slice(torch.arange(batch), 0, world_size, accumulation)


@st.composite
def shard_orders(draw: st.DrawFn) -> GlobalOrder:
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=20).filter(any))
    ends = tuple(torch.tensor(sizes).cumsum(0).tolist())
    batch, seed, together = (
        draw(st.integers(1, ends[-1])),
        draw(st.integers(0, 2**63)),
        draw(st.integers(1, 25)),
    )
    return GlobalOrder(ends[-1], batch, seed, shard_ends=ends, shuffle_shards=together)


def epoch_of(order: GlobalOrder, epoch: int) -> torch.Tensor:
    first = epoch * order.steps_per_epoch
    return torch.cat([order.batch(step)[1] for step in range(first, first + order.steps_per_epoch)])


@given(shard_orders(), st.integers(0, 3))
def test_shards_are_shuffled_a_few_together_and_every_image_comes_once(
    order: GlobalOrder, epoch: int
) -> None:
    indices = epoch_of(order, epoch)
    assert len(indices) == order.steps_per_epoch * order.global_batch
    assert len(indices.unique()) == len(indices)
    assert 0 <= int(indices.min()) <= int(indices.max()) < order.images
    shards = torch.searchsorted(torch.tensor(order.shard_ends), indices, right=True).tolist()
    # Between its first and its last image a shard is open; never are more of them than so many.
    opens = {shard: place for place, shard in reversed(list(enumerate(shards)))}
    closes = {shard: place for place, shard in enumerate(shards)}
    for place in range(len(shards)):
        assert sum(opens[shard] <= place <= closes[shard] for shard in opens) <= order.shuffle_shards


@given(shard_orders(), st.lists(st.integers(0, 5000), min_size=1, max_size=5))
def test_a_step_has_its_images_of_shards_wherever_one_starts(order: GlobalOrder, steps: list[int]) -> None:
    straight = {step: order.batch(step)[1] for step in sorted(steps)}
    for step in steps:
        assert torch.equal(order.batch(step)[1], straight[step])


def test_shards_come_in_another_order_in_each_epoch_and_run() -> None:
    ends = tuple(range(100, 3100, 100))
    order = GlobalOrder(3000, 30, seed=0, shard_ends=ends, shuffle_shards=4)
    firsts = [epoch_of(order, epoch)[:400] // 100 for epoch in range(3)]
    other = GlobalOrder(3000, 30, seed=1, shard_ends=ends, shuffle_shards=4)
    seen = {tuple(shards.unique().tolist()) for shards in (*firsts, epoch_of(other, 0)[:400] // 100)}
    assert len(seen) == 4
    assert all(len(shards) == 4 for shards in seen)
    assert len(firsts[0][:40].unique()) == 4  # shuffled together, and not one after another


def test_no_more_of_the_order_is_computed_than_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    words, drawn = order_module.random_words, list[int]()

    def counted(seed: int, stream: Stream, index: torch.Tensor, epoch: int, count: int) -> torch.Tensor:
        drawn.append(len(index))
        return words(seed, stream, index, epoch, count)

    monkeypatch.setattr(order_module, "random_words", counted)
    ends = tuple(range(1000, 1_201_000, 1000))
    order = GlobalOrder(1_200_000, 256, seed=3, shard_ends=ends, shuffle_shards=8)
    order.batch(9_999)
    assert sum(drawn) <= 1200 + 2 * 8 * 1000


def test_the_order_of_a_folder_is_what_it_was() -> None:
    order = GlobalOrder(10, 5, seed=7)
    assert [order.batch(step)[1].tolist() for step in range(2)] == FOLDER_ORDER
    with pytest.raises(ValueError, match="the shards end after 9 images, the set has 10"):
        GlobalOrder(10, 5, seed=7, shard_ends=(4, 9))

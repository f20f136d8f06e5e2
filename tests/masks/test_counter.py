import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjepa.masks.counter import Stream, below, philox, random_words, uniform

WORDS = st.integers(0, 2**32 - 1)


def philox_of_integers(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Ten rounds of Philox-4x32 in Python's unbounded integers."""
    a, b, c, d = counter
    for i in range(10):
        k0, k1 = (key[0] + i * 0x9E3779B9) % 2**32, (key[1] + i * 0xBB67AE85) % 2**32
        (high0, low0), (high1, low1) = divmod(a * 0xD2511F53, 2**32), divmod(c * 0xCD9E8D57, 2**32)
        a, b, c, d = high1 ^ b ^ k0, low1, high0 ^ d ^ k1, low0
    return a, b, c, d


def philox_words(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    a, b, c, d = (torch.tensor(word) for word in counter)
    return tuple(int(word) for word in philox((a, b, c, d), (key[0], key[1])))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: str
) -> None:
    assert " ".join(f"{word:08x}" for word in philox_words(counter, key)) == expected


@settings(deadline=None)
@given(st.tuples(WORDS, WORDS, WORDS, WORDS), st.tuples(WORDS, WORDS))
def test_int64_arithmetic_equals_that_of_unbounded_integers(
    counter: tuple[int, ...], key: tuple[int, ...]
) -> None:
    assert philox_words(counter, key) == philox_of_integers(counter, key)


@settings(deadline=None)
@given(
    seed=st.integers(-(2**70), 2**70),
    stream=st.sampled_from(Stream),
    index=st.lists(WORDS, min_size=1, max_size=4),
    epoch=WORDS,
    count=st.integers(1, 40),
    attempt=st.integers(0, 2**12 - 1),
)
def test_words_are_a_function_of_their_purpose_alone(
    seed: int, stream: Stream, index: list[int], epoch: int, count: int, attempt: int
) -> None:
    words = random_words(seed, stream, torch.tensor(index), epoch, count, attempt)
    assert words.shape == (len(index), count)
    assert words.dtype == torch.int64
    assert 0 <= int(words.min()) <= int(words.max()) < 2**32
    for row, number in enumerate(index):
        # Neither its neighbours in the batch nor how many words are asked for changes a word.
        alone = random_words(seed, stream, torch.tensor([number]), epoch, count + 3, attempt)
        assert torch.equal(alone[0, :count], words[row])


def test_every_part_of_the_purpose_changes_the_words() -> None:
    index = torch.tensor([5])
    draws = [
        random_words(0, Stream.CROP, index, 0, 4),
        random_words(1, Stream.CROP, index, 0, 4),
        random_words(1 << 32, Stream.CROP, index, 0, 4),
        *(random_words(0, stream, index, 0, 4) for stream in Stream if stream is not Stream.CROP),
        random_words(0, Stream.CROP, index + 1, 0, 4),
        random_words(0, Stream.CROP, index, 1, 4),
        random_words(0, Stream.CROP, index, 0, 4, attempt=1),
    ]
    assert len({tuple(draw[0].tolist()) for draw in draws}) == len(draws)


def test_uniform_keeps_all_32_bits_and_never_reaches_one() -> None:
    index = torch.arange(10_000)
    words = random_words(3, Stream.CROP, index, 2, 10)
    chances = uniform(3, Stream.CROP, index, 2, 10)
    assert chances.dtype == torch.float64
    # No word is rounded, so the largest, 2**32 - 1, stays below 1.
    assert torch.equal((chances * 2**32).long(), words)
    # The mean of n uniform numbers has a standard deviation of 1 / sqrt(12 n).
    assert abs(float(chances.mean()) - 0.5) < 5 / (12 * chances.numel()) ** 0.5


@given(word=WORDS | st.sampled_from([0, 2**32 - 1]), bound=st.integers(1, 2**31 - 1))
def test_below_is_the_exact_high_half(word: int, bound: int) -> None:
    assert int(below(torch.tensor(word), bound)) == word * bound // 2**32 < bound


def test_below_is_unbiased() -> None:
    words = random_words(0, Stream.CROP, torch.arange(70_000), 0, 1)
    counts = below(words, torch.tensor(7)).flatten().bincount(minlength=7).double()
    assert len(counts) == 7
    chi_square = float(((counts - 10_000) ** 2 / 10_000).sum())
    assert chi_square < 33, "6 degrees of freedom: beyond this once in 1e5"

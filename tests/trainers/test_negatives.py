from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.negatives import (
    StreamingFrequency,
    UnigramSampler,
    frequency,
    keep_probability,
    unigram_probability,
)

COUNTS = np.array([1000, 0, 300, 100, 30, 10, 3, 1, 0])


def implied(sampler: UnigramSampler) -> np.ndarray:
    """The probability that the alias tables give every row: that of its run, and its share of the run's rows."""
    accept, alias = sampler._accept, sampler._alias
    assert ((accept >= 0) & (accept <= 1 + 1e-9)).all()
    of_run = (accept + np.bincount(alias, weights=1 - accept, minlength=len(accept))) / len(accept)
    return np.repeat(of_run / sampler._lengths, sampler._lengths)


@settings(deadline=None, derandomize=True)
@given(counts=st.lists(st.integers(0, 10**9), min_size=1, max_size=60), exponent=st.sampled_from([-1.0, 0.0, 0.5, 1.0]))
def test_the_alias_tables_hold_the_unigram_distribution(counts: list[int], exponent: float) -> None:
    sampler = UnigramSampler(np.array(counts), exponent)
    np.testing.assert_allclose(implied(sampler), sampler.probability.dense(), atol=1e-12)


@pytest.mark.parametrize("exponent", [-0.5, 0.0, 0.75, 1.0])
def test_rows_are_drawn_by_count_to_the_exponent(exponent: float) -> None:
    weight = np.array([float(count) ** exponent if count else 0.0 for count in COUNTS])
    wanted = weight / weight.sum()
    num = 400_000
    share = np.bincount(UnigramSampler(COUNTS, exponent).draw(num, seed=5), minlength=len(COUNTS)) / num
    assert not share[COUNTS == 0].any()
    assert (np.abs(share - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / num)).all()


def test_rows_that_never_occur_are_drawn_only_if_none_does() -> None:
    assert unigram_probability(np.zeros(4, np.int64), 0.75).dense().tolist() == [0.25] * 4
    drawn = UnigramSampler(np.zeros(4, np.int64), 0.75).draw(1000, 0)
    assert set(drawn.tolist()) == {0, 1, 2, 3}


def test_rows_of_one_count_are_drawn_alike() -> None:
    """Runs are drawn as a whole: each of their rows must still come equally often, and no other."""
    counts = np.repeat([50, 7, 1], [3, 40, 200])
    num = 500_000
    share = np.bincount(UnigramSampler(counts, 0.5).draw(num, seed=3), minlength=len(counts)) / num
    wanted = np.sqrt(counts) / np.sqrt(counts).sum()
    assert (np.abs(share - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / num)).all()


def test_a_draw_is_a_pure_function_of_the_seed() -> None:
    sampler = UnigramSampler(COUNTS, 0.5)
    first = sampler.draw(1000, 7)
    assert first.dtype == np.int64
    sampler.draw(10, 8)
    assert np.array_equal(UnigramSampler(COUNTS, 0.5).draw(1000, 7), first)
    assert np.array_equal(sampler.draw(10, 7), first[:10])
    assert not np.array_equal(sampler.draw(1000, 8), first)
    assert len(sampler.draw(0, 7)) == 0


def test_draws_of_neighbouring_seeds_are_not_related() -> None:
    sampler = UnigramSampler(np.ones(64, np.int64), 1.0)
    first, second = sampler.draw(20_000, 1), sampler.draw(20_000, 2)
    for shift in (0, 1, 2):
        same = (first[shift:] == second[: len(second) - shift]).mean()
        assert same == pytest.approx(1 / 64, abs=5 * np.sqrt(1 / 64 / 20_000))


def test_frequency_is_the_share_of_all_events() -> None:
    np.testing.assert_allclose(frequency(np.array([6, 0, 4])).dense(), [0.6, 0.05, 0.4])
    assert (frequency(np.zeros(3, np.int64)).dense() > 0).all()


def drawn(popularity: np.ndarray, num: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice(len(popularity), size=num, p=popularity)


ZIPF = (1.0 / np.arange(1, 201)) / (1.0 / np.arange(1, 201)).sum()


def test_streaming_frequency_estimates_the_share() -> None:
    stream = StreamingFrequency(1 << 14)
    for part in np.array_split(drawn(ZIPF, 100_000, 0), 50):
        stream.update(part)
    ratio = stream.share(np.arange(200)) / ZIPF
    assert np.median(ratio) == pytest.approx(1.0, abs=0.05)
    assert ratio.std() < 0.12  # gaps vary by their mean; a hundred of them are averaged


def test_streaming_frequency_of_rare_items_is_not_their_first_gap() -> None:
    stream = StreamingFrequency(1 << 14)
    stream.update(np.concatenate([[7], np.arange(100, 1000), [7], np.arange(1000, 1999), [7]]))
    assert stream.share(np.array([7]))[0] == pytest.approx(3 / 1902, rel=1e-9)
    assert stream.share(np.array([5000]))[0] == pytest.approx(0.5 / 1903, rel=1e-9)  # not met yet: half an event


def test_streaming_frequency_follows_a_drift() -> None:
    stream = StreamingFrequency(1 << 14)
    stream.update(drawn(ZIPF, 50_000, 1))
    stream.update(drawn(ZIPF[::-1], 50_000, 2))
    assert stream.share(np.array([199]))[0] == pytest.approx(ZIPF[0], rel=0.5)
    assert stream.share(np.array([0]))[0] < ZIPF[0] / 5


def test_streaming_frequency_with_shared_slots_takes_the_larger_gap() -> None:
    small, large = StreamingFrequency(150), StreamingFrequency(1 << 14)
    items = drawn(ZIPF, 50_000, 3)
    small.update(items)
    large.update(items)
    ratio = small.share(np.arange(200)) / large.share(np.arange(200))
    assert (ratio > 0.6).all()  # what others share a slot with looks more frequent, never less
    assert np.median(ratio) < 2.0


def test_streaming_frequency_does_not_depend_on_the_batches_and_survives_a_checkpoint() -> None:
    items = drawn(ZIPF, 3000, 4)
    whole, parts = StreamingFrequency(64), StreamingFrequency(64)
    whole.update(items)
    parts.update(items[:1234])
    again = StreamingFrequency(64)
    again.load_state_dict(parts.state_dict())
    again.update(items[1234:])
    assert np.array_equal(again.share(np.arange(200)), whole.share(np.arange(200)))


def test_keep_probability_is_word2vecs() -> None:
    counts = np.array([9000, 990, 10, 0])
    found = keep_probability(counts, 1e-2).dense()
    for count, keep in zip(counts[:3], found, strict=False):
        share = count / counts.sum()
        assert keep == pytest.approx(min(1.0, (np.sqrt(share / 1e-2) + 1) * 1e-2 / share), rel=1e-6)  # word2vec.c
    assert found.dtype == np.float32
    assert found[2:].tolist() == [1.0, 1.0]

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from cluster.errors import DataError
from trainers.key_sketch import KeySketch, KeySummary, fit_zipf, ranks_to, zipf_mass

NUM_KEYS = 400_000  # more than the sketches hold: what they say is estimated
COUNTS = 1 + (300_000 / np.arange(1, NUM_KEYS + 1) ** 1.1).astype(np.int64)
TOPS = (1, 30, 1_000, 20_000, 100_000, 300_000)


def _stream() -> np.ndarray:
    keys = np.repeat(np.arange(NUM_KEYS) * 7919 - 10**9, COUNTS)
    np.random.default_rng(3).shuffle(keys)
    return keys


def _sketch(chunks: list[np.ndarray]) -> KeySketch:
    sketch = KeySketch("int64")
    for chunk in chunks:
        sketch.add(pa.array(chunk))
    return sketch


def _check(summary: KeySummary) -> None:
    assert summary.num_keys == COUNTS.sum()
    assert summary.distinct.low <= NUM_KEYS <= summary.distinct.high
    assert summary.distinct.high - summary.distinct.low < 0.02 * NUM_KEYS
    for top in TOPS:
        found, truth = summary.coverage(top), COUNTS[:top].sum() / COUNTS.sum()
        assert found.low <= truth <= found.high, top
        assert found.high - found.low < 0.02, top
    for least in (2, 3, 10):
        kept = summary.num_at_least(least)
        truth = (least <= COUNTS).sum()
        assert kept.low <= truth <= kept.high
    heavy = [int(key) for key in summary.frequent[:20]]
    assert heavy[:5] == [7919 * i - 10**9 for i in range(5)]
    counts = COUNTS[[(key + 10**9) // 7919 for key in heavy]]
    assert (summary.frequent_low[:20] <= counts).all()
    assert (counts <= summary.frequent_high[:20]).all()


def test_bounds_hold_the_truth_where_the_keys_are_more_than_the_sketch_holds() -> None:
    stream = _stream()
    whole = _sketch(np.array_split(stream, 7))
    _check(whole.summary())
    parts = [_sketch([part]) for part in np.array_split(stream, 3)]
    merged = KeySketch("int64")
    for part in reversed(parts):  # over the wire, and in another order
        merged.merge(KeySketch.from_state(json.loads(json.dumps(part.state()))))
    _check(merged.summary())
    merged.add(pa.array([1, 1]))
    assert merged.summary().num_keys == COUNTS.sum() + 2


@pytest.mark.parametrize("keys", [[5, 5, -1, 2**63 - 1], ["", "", "é\0", "b"]])
def test_few_keys_are_counted_exactly(keys: list[int] | list[str]) -> None:
    sketch = KeySketch.of(pa.array(keys))
    sketch.add(pa.array(keys))
    other = KeySketch.from_state(sketch.state())
    other.merge(sketch)
    summary = other.summary()
    assert (summary.distinct.low, summary.distinct.value, summary.distinct.high) == (3, 3, 3)
    assert dict(zip(summary.frequent, summary.frequent_low, strict=True)) == {keys[0]: 4, keys[2]: 2, keys[3]: 2}
    assert summary.frequent_low.tolist() == summary.frequent_high.tolist()
    assert [(top, one.value) for top, one in summary.coverage_table()] == [(1, 0.5), (2, 0.75), (3, 1.0)]
    assert summary.num_at_least(3).value == 1


def test_keys_of_two_types_do_not_mix() -> None:
    sketch = KeySketch("string")
    with pytest.raises(DataError, match="string at first and int64 later"):
        sketch.add(pa.array([1]))
    with pytest.raises(DataError, match="string in one part and int64 in another"):
        sketch.merge(KeySketch("int64"))


def test_the_fitted_exponent_is_the_planted_one() -> None:
    for exponent in (0.0, 0.6, 1.0, 1.3):
        share = np.cumsum(np.arange(1, 200_001) ** -exponent)
        tops = [*ranks_to(200_000), 200_000]
        found, misfit = fit_zipf(tops, (share / share[-1])[np.array(tops) - 1].tolist())
        assert found == pytest.approx(exponent, abs=1e-3)
        assert misfit < 1e-4


def test_the_mass_of_many_ranks_is_their_sum() -> None:
    for exponent in (0.0, 0.5, 1.0, 2.0):
        terms = np.cumsum(np.arange(1, 50_001) ** -exponent)
        ranks = np.array([1.0, 999, 1000, 1001, 50_000])
        np.testing.assert_allclose(zipf_mass(ranks, exponent), terms[ranks.astype(int) - 1], rtol=1e-9)

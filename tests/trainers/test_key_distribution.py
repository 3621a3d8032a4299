from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from embedding_service.row_maps import RowMap
from trainers.key_distribution import KeyDistribution, rows_of_step
from trainers.key_sketch import KeySketch

IDS = 5_000


def _probability(exponent: float) -> np.ndarray:
    weight = np.arange(1, IDS + 1) ** -exponent
    return weight / weight.sum()


def _draws(number: int, exponent: float = 1.0) -> np.ndarray:
    return np.random.default_rng(2).choice(IDS, number, p=_probability(exponent))


def test_distinct_ids_of_a_step() -> None:
    distribution = KeyDistribution.zipf(IDS, 1.0)
    for number in (1, 100, 3_000, 50_000):
        expected = (1 - (1 - _probability(1.0)) ** number).sum()
        assert distribution.distinct(number) == pytest.approx(expected, rel=0.01)
    assert distribution.coverage(100) == pytest.approx(_probability(1.0)[:100].sum(), rel=0.01)
    negatives = distribution.power(0.5)
    assert negatives.distinct(3_000) == pytest.approx((1 - (1 - _probability(0.5)) ** 3_000).sum(), rel=0.02)


def test_counts_and_profiles_say_the_same() -> None:
    draws = _draws(100_000)
    keys, counts = np.unique(draws, return_counts=True)
    sketch = KeySketch("int64")
    sketch.add(pa.array(draws))
    of_profile = KeyDistribution.of_profile(sketch.summary().to_dict(), len(keys))
    of_counts = KeyDistribution.of_counts(np.sort(counts)[::-1])
    for top in (1, 50, 1_000):
        assert of_profile.coverage(top) == pytest.approx(of_counts.coverage(top), abs=0.01)
    assert of_profile.distinct(2_000) == pytest.approx(of_counts.distinct(2_000), rel=0.05)
    fewer = KeyDistribution.of_profile(sketch.summary().to_dict(), 100)
    more = KeyDistribution.of_profile(sketch.summary().to_dict(), 10**9)
    assert fewer.sizes.sum() == 100
    assert fewer.shares.sum() == pytest.approx(1.0)
    assert more.sizes.sum() == 10**9
    assert more.distinct(2_000) > of_profile.distinct(2_000)


@pytest.mark.parametrize(
    "map",
    [
        RowMap("hashed", IDS, 1_000, hashes=1),
        RowMap("hashed", IDS, 4_000, hashes=2),
        RowMap("head_tail", IDS, 1_500, head=700, hashes=2),
        RowMap.quotient_remainder(IDS, 300),
        RowMap.exact(IDS),
    ],
)
def test_expected_rows_of_a_step_are_those_of_the_map(map: RowMap) -> None:
    distribution = KeyDistribution.zipf(IDS, 1.0)
    rows = len(np.unique(map.lists(np.unique(_draws(2_000))).values))
    assert rows_of_step(map, distribution, 2_000) == pytest.approx(rows, rel=0.06)

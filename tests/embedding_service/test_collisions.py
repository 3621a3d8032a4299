"""Collisions: the count is that of a slow loop, and the formula is its mean."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest

from embedding_service.collisions import Collisions, count_collisions, expected_collisions
from embedding_service.row_maps import RowMap

HASHED = [
    RowMap("hashed", 10_000, 20_000),
    RowMap("hashed", 10_000, 200, hashes=2),
    RowMap("hashed", 10_000, 40, hashes=3),
    RowMap("head_tail", 10_000, 300, head=100, hashes=2),
    RowMap("head_tail", 10_000, 9_000, head=100, hashes=2),
]
DIVIDED = [
    RowMap.quotient_remainder(1000, 100),
    RowMap.quotient_remainder(1000, 700),
    RowMap.quotient_remainder(1001, 503),
]


def slow(map: RowMap) -> Collisions:
    lists = [tuple(sorted(rows)) for rows in map.lists(np.arange(map.ids)).to_lists()]
    same, users = Counter(lists), Counter(row for rows in lists for row in set(rows))
    return Collisions(
        sum(same[rows] > 1 for rows in lists) / map.ids,
        sum(all(users[row] > 1 for row in rows) for rows in lists) / map.ids,
    )


@pytest.mark.parametrize("map", HASHED + DIVIDED)
def test_counted_as_a_loop_does(map: RowMap) -> None:
    found, wanted = count_collisions(map), slow(map)
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(wanted))


@pytest.mark.parametrize("map", HASHED)
def test_the_formula_is_what_hashes_give(map: RowMap) -> None:
    expected, found = expected_collisions(map), count_collisions(map)
    assert found.all_shared > 0.0
    # a share of n ids is off by about sqrt(2 share / n), as colliding ids come in pairs
    for share, measured in zip(dataclasses.astuple(expected), dataclasses.astuple(found), strict=True):
        assert abs(share - measured) < 5 * (2 * share / map.ids) ** 0.5 + 1e-9


@pytest.mark.parametrize("map", DIVIDED)
def test_quotients_and_remainders_are_counted_by_arithmetic(map: RowMap) -> None:
    assert dataclasses.astuple(expected_collisions(map)) == pytest.approx(dataclasses.astuple(count_collisions(map)))


def test_an_exact_map_and_one_of_billions() -> None:
    assert expected_collisions(RowMap.exact(7)) == count_collisions(RowMap.exact(7)) == Collisions(0.0, 0.0)
    billions = expected_collisions(RowMap("hashed", 10**9, 10**8, hashes=2))
    assert billions.same_rows == pytest.approx(2e9 / 1e16, rel=1e-3)
    assert billions.all_shared == pytest.approx(1.0, abs=1e-6)

"""How many ids a row map gives rows that others have, too: by the theory of balls in bins, and counted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedding_service.row_maps import RowMap

_CHUNK_IDS = 1_000_000


@dataclass(frozen=True)
class Collisions:
    """Shares of all ids in [0, 1].

    same_rows: whose rows are all the rows of another id, so that without learned weights both have one vector and a
    ranking cannot tell them apart. all_shared: none of whose rows is theirs alone.
    """

    same_rows: float
    all_shared: float


def expected_collisions(map: RowMap) -> Collisions:
    """What independent uniform hashes give in the mean: balls in bins (Mitzenmacher and Upfal, chapter 5), for n ids in
    m rows by k hashes.

    same_rows: sum over multisets s of k rows of P(s) (1 - (1 - P(s)) ** (n - 1)), P(s) = k! / (c_1! c_2! ...) / m ** k
    for rows that occur c_1, c_2... times. all_shared: (1 - (1 - 1 / m) ** (k (n - 1))) ** k, which takes an id's rows
    for independent. Quotients and remainders are counted, not hashed.
    """
    if map.is_exact:
        return Collisions(0.0, 0.0)
    if map.remainders:
        return Collisions(0.0, _all_shared_by_division(map))
    num, rows, hashes = map.ids - map.head, map.rows - map.head, map.hashes
    same = sum(math.exp(log_ways + log_p) * _met(num - 1, math.exp(log_p)) for log_ways, log_p in _kinds(rows, hashes))
    shared = _met(hashes * (num - 1), 1.0 / rows) ** hashes
    share = num / map.ids
    return Collisions(share * same, share * shared)


def _met(times: int, probability: float) -> float:
    """1 - (1 - probability) ** times."""
    return -math.expm1(times * math.log1p(-probability)) if probability < 1.0 else float(times > 0)


def _kinds(rows: int, hashes: int) -> Iterator[tuple[float, float]]:
    """For every way in which `hashes` rows may repeat: (log of how many such multisets there are, log P of one)."""
    for parts in _partitions(hashes, hashes):
        distinct = len(parts)
        if distinct > rows:
            continue
        ways = sum(math.log(rows - i) for i in range(distinct))
        ways -= sum(math.lgamma(parts.count(part) + 1) for part in set(parts))
        orders = math.lgamma(hashes + 1) - sum(math.lgamma(part + 1) for part in parts)
        yield ways, orders - hashes * math.log(rows)


def _partitions(total: int, largest: int) -> Iterator[tuple[int, ...]]:
    """The ways to write `total` as a sum of descending parts."""
    if not total:
        yield ()
    for part in range(min(total, largest), 0, -1):
        for rest in _partitions(total - part, part):
            yield (part, *rest)


def _all_shared_by_division(map: RowMap) -> float:
    """All but the ids that are the only ones with their remainder, or with their quotient."""
    last = map.ids % map.remainders
    alone = max(0, 2 * map.remainders - map.ids)  # remainders of a single id
    return 1.0 - (alone + (last == 1 and map.ids > map.remainders)) / map.ids


def count_collisions(map: RowMap) -> Collisions:
    """The collisions of `map` itself, counted over all its ids; takes 8 bytes per row and up to 24 per id."""
    if map.is_exact:
        return Collisions(0.0, 0.0)
    users = np.zeros(map.rows, np.int64)  # ids that have the row
    marks = np.empty(map.ids - map.head, np.uint64)
    for start, rows in _chunks(map):
        first = np.ones(rows.shape, bool)
        first[:, 1:] = rows[:, 1:] != rows[:, :-1]  # an id that has a row twice is one of its users
        np.add.at(users, rows[first], 1)
        marks[start : start + len(rows)] = _mark(rows)
    shared = sum(int((users[rows] > 1).all(axis=1).sum()) for _, rows in _chunks(map))
    _, counts = np.unique(marks, return_counts=True)
    return Collisions(int(counts[counts > 1].sum()) / map.ids, shared / map.ids)


def _chunks(map: RowMap) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """(place of the first, rows int64 [n, k] in ascending order) of the ids that share rows."""
    for start in range(map.head, map.ids, _CHUNK_IDS):
        lists = map.lists(np.arange(start, min(map.ids, start + _CHUNK_IDS)))
        yield start - map.head, np.sort(lists.values.reshape(len(lists), -1), axis=1)


def _mark(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """64 bits that tell lists of rows apart: uint64 [n]; two of 10 ** 7 ids are mistaken for equal once in 10 ** 5."""
    mark = np.zeros(len(rows), np.uint64)
    for column in rows.T:
        mark = (mark ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        mark ^= mark >> np.uint64(29)
        mark *= np.uint64(0xBF58476D1CE4E5B9)
        mark ^= mark >> np.uint64(32)
    return mark

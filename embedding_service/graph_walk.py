"""The search of an HNSW graph by the vectors that an artifact stores, in place of the copy that FAISS keeps.

What a graph search does is read some hundreds of vectors that lie anywhere. Stored fp16 and int8 vectors are a half and
a quarter of FAISS's float32, and while one is scored the next ones are on their way: on the same graph, over 100,000
items of 64 fp16 numbers, a query takes half the time of FAISS's, and finds the same (`tests.benchmarks.serve_load`).

The order of q.x is that of the index, however it has arranged x (see `index`), so that queries are taken as they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, types

from embedding_service.exact import Float32, Int64, Metric
from embedding_service.rank_kernels import decoded, prefetch
from embedding_service.vectors import VectorSet

_CACHE_LINE = 64  # bytes
_MOST_LINES = 8  # of a vector that are fetched ahead; the processor sees by itself what follows
_NUM_SLOTS = 4096  # for rows that a query has met; twice as many whenever half are taken
_FLOATS_IN = types.Array(types.float32, 1, "C", readonly=True)
_INT64S_IN = types.Array(types.int64, 1, "C", readonly=True)


class GraphWalk:
    """Searches one graph for the rows whose stored vectors score highest. Safe to use from many threads."""

    def __init__(
        self,
        neighbours: npt.NDArray[np.int32],
        offsets: Int64,
        widths: Int64,
        entry: int,
        top: int,
        vectors: VectorSet,
        metric: Metric,
    ) -> None:
        """neighbours int32 [m]: of all rows on all levels, -1 where there are no more; row i's begin at offsets[i]
        (int64 [rows + 1]), those of its level l at widths[l] (int64 [levels + 1]) further on. Searches begin at the row
        `entry` (-1: none) on the level `top`.
        """
        codes, scale = vectors.stored
        factors = vectors.unit_factors if metric == "cosine" else scale
        self._graph = neighbours, offsets, widths, entry, top, codes, factors

    def search_rows(self, queries: Float32, k: int, breadth: int) -> Int64:
        """The best k rows that are found for queries [n, dim], best first: int64 [n, k], -1 where there are fewer.

        `breadth`, at least k: how many of the best rows are kept, and their neighbours looked at (efSearch).
        """
        found = np.empty((len(queries), k), np.int64)
        _walk(np.ascontiguousarray(queries, np.float32), *self._graph, max(k, breadth), found)
        return found


@njit(fastmath={"reassoc", "contract"}, error_model="numpy")
def _dot(query: Any, code: Any) -> Any:
    total = np.float32(0.0)
    for d in range(len(query)):
        total += query[d] * decoded(code[d])
    return total


@njit(error_model="numpy")
def _score(query: Any, codes: Any, factors: Any, row: int) -> Any:
    score = _dot(query, codes[row])
    return score * factors[row] if len(factors) else score


@njit(error_model="numpy")
def _prefetch_from(address: int, num_bytes: int) -> None:
    for offset in range(0, min(num_bytes, _MOST_LINES * _CACHE_LINE), _CACHE_LINE):
        prefetch(address + offset)  # type: ignore[call-arg]  # numba adds the first argument


@njit(error_model="numpy")
def _slot(row: Any, mask: int) -> Any:
    return (row * 0x9E3779B1) & mask  # 2^32 over the golden ratio: neighbours' numbers are spread (Knuth, 6.4)


@njit(error_model="numpy")
def _nearest(
    query: Any, neighbours: Any, offsets: Any, widths: Any, entry: Any, top: int, codes: Any, factors: Any
) -> Any:
    """Uphill on the levels above the lowest: the row where that ends, and its score."""
    row_bytes = codes.shape[1] * codes.itemsize
    best, score = entry, _score(query, codes, factors, entry)
    for level in range(top, 0, -1):
        moved = True
        while moved:
            moved = False
            begin = offsets[best] + widths[level]
            end = min(offsets[best] + widths[level + 1], offsets[best + 1])
            for j in range(begin, end):
                if neighbours[j] >= 0:
                    _prefetch_from(codes.ctypes.data + neighbours[j] * row_bytes, row_bytes)
            for j in range(begin, end):
                row = neighbours[j]
                if row < 0:
                    break
                other = _score(query, codes, factors, row)
                if other > score:
                    best, score, moved = np.int64(row), other, True
    return best, score


@njit(error_model="numpy")
def _doubled(met: Any, number: int) -> Any:
    larger = np.zeros(2 * len(met), np.int64)
    for note in met:
        if note >> 32 == number:
            slot = _slot(note & 0xFFFFFFFF, len(larger) - 1)
            while larger[slot] != 0:
                slot = (slot + 1) & (len(larger) - 1)
            larger[slot] = note
    return larger


def _walk_of(codes: Any) -> Any:
    return types.void(
        types.Array(types.float32, 2, "C", readonly=True),
        types.Array(types.int32, 1, "C", readonly=True),
        _INT64S_IN,
        _INT64S_IN,
        types.int64,
        types.int64,
        types.Array(codes, 2, "C", readonly=True),
        _FLOATS_IN,
        types.int64,
        types.Array(types.int64, 2, "C"),
    )


@njit(
    [_walk_of(types.float32), _walk_of(types.uint16), _walk_of(types.int8)],
    nogil=True,
    cache=True,
    error_model="numpy",
)
def _walk(
    queries: Any,
    neighbours: Any,
    offsets: Any,
    widths: Any,
    entry: int,
    top: int,
    codes: Any,
    factors: Any,
    breadth: int,
    found: Any,
) -> None:
    """Algorithm 5 of Malkov and Yashunin (2018), with W as a sorted list that also says which rows are candidates.

    Candidates beyond the last of W are never looked at, so that W holds all of C that matters. Which rows a query has
    met is kept in a hash table, since a note per row of the catalogue would have to be cleared; a slot is free where it
    was written for another query.
    """
    row_bytes = codes.shape[1] * codes.itemsize
    rows, scores = np.empty(breadth, np.int64), np.empty(breadth, np.float32)
    expanded = np.empty(breadth, np.bool_)
    fresh = np.empty(widths[1], np.int64)
    met = np.zeros(_NUM_SLOTS, np.int64)  # query number << 32 | row
    for i in range(len(queries)):
        if entry < 0:
            found[i] = -1
            continue
        query, number = queries[i], i + 1
        row, score = _nearest(query, neighbours, offsets, widths, entry, top, codes, factors)
        rows[0], scores[0], expanded[0] = row, score, False
        met[_slot(row, len(met) - 1)] = (number << 32) | row
        num, num_met, next_ = 1, 1, 0
        while next_ < num:
            expanded[next_] = True
            begin = offsets[rows[next_]]
            num_fresh = 0
            for j in range(begin, begin + widths[1]):
                row = np.int64(neighbours[j])
                if row < 0:
                    break
                slot = _slot(row, len(met) - 1)
                while met[slot] >> 32 == number and met[slot] & 0xFFFFFFFF != row:
                    slot = (slot + 1) & (len(met) - 1)
                if met[slot] >> 32 != number:
                    met[slot] = (number << 32) | row
                    fresh[num_fresh] = row
                    num_fresh += 1
                    _prefetch_from(codes.ctypes.data + row * row_bytes, row_bytes)
            num_met += num_fresh
            if 2 * (num_met + len(fresh)) > len(met):
                met = _doubled(met, number)
            next_ += 1
            for j in range(num_fresh):
                row = fresh[j]
                score = _score(query, codes, factors, row)
                if num == breadth and score <= scores[num - 1]:
                    continue
                place = min(num, breadth - 1)
                num = place + 1
                while place > 0 and scores[place - 1] < score:
                    rows[place], scores[place] = rows[place - 1], scores[place - 1]
                    expanded[place] = expanded[place - 1]
                    place -= 1
                rows[place], scores[place], expanded[place] = row, score, False
                next_ = min(next_, place)
            while next_ < num and expanded[next_]:
                next_ += 1
            if next_ < num:
                _prefetch_from(neighbours.ctypes.data + 4 * offsets[rows[next_]], 4 * widths[1])
        for j in range(found.shape[1]):
            found[i, j] = rows[j] if j < num else -1

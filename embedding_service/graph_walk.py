"""The search of an HNSW graph by the vectors that an artifact stores, in place of the copy that FAISS keeps.

What a graph search does is read some hundreds of vectors that lie anywhere. Stored fp16 and int8 vectors are a half and
a quarter of FAISS's float32, and while one is scored the next ones are on their way: `index_tradeoff` has what that
saves on the same graph (`walk_over_faiss`), with the vectors in memory; what was mapped and not yet read comes from
disk.

The order of q.x is that of the index, however it has arranged x (see `index`), so that queries are taken as they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit, types

from embedding_service.exact import Float32, Int64, Metric
from embedding_service.rank_kernels import decoded, prefetch_from
from embedding_service.vectors import VectorSet

_MOST_AHEAD = 512  # bytes of a vector that are fetched ahead; the processor sees by itself what follows
_SLOT_BITS = 12  # of the table of rows that a query has met, at first
_FLOATS_IN = types.Array(types.float32, 1, "C", readonly=True)
_INT64S_IN = types.Array(types.int64, 1, "C", readonly=True)


class Graph(NamedTuple):
    """The arrays of an HNSW graph, checked (`faiss_header`).

    neighbours int32 [m]: of all rows on all levels, -1 where there are no more; row i's begin at offsets[i] (int64
    [rows + 1]), those of its level l at widths[l] (int64 [levels + 1]) further on. Searches begin at the row `entry`
    (-1: the graph is empty) on the level `top`. `owner` has the memory.
    """

    neighbours: npt.NDArray[np.int32]
    offsets: Int64
    widths: Int64
    entry: int
    top: int
    owner: Any


class GraphWalk:
    """Searches one graph for the rows whose stored vectors score highest. Safe to use from many threads."""

    def __init__(self, graph: Graph, vectors: VectorSet, metric: Metric) -> None:
        """`vectors`: those of the graph's rows. Raises ValueError for another number of them."""
        if vectors.rows != len(graph.offsets) - 1:
            raise ValueError(f"{vectors.rows} vectors for a graph of {len(graph.offsets) - 1} rows")
        codes, scale = vectors.stored
        self._graph, self._codes = graph, codes
        self._factors = vectors.unit_factors if metric == "cosine" else scale

    def search_rows(self, queries: Float32, k: int, breadth: int, starts: Int64 | None = None) -> Int64:
        """The best k rows that are found for queries [n, dim], best first: int64 [n, k], -1 where there are fewer.

        `breadth`: how many of the best rows are kept, and their neighbours looked at (efSearch); at least k are.
        `starts`: int64 [n], rows that are near the queries: the way down to such a row is saved (-1: none is known).
        Raises ValueError for queries of another dim, or starts that are no rows.
        """
        rows, dim = self._codes.shape
        if queries.ndim != 2 or queries.shape[1] != dim:
            raise ValueError(f"queries must be [n, {dim}]; got {list(queries.shape)}")
        if starts is None:
            starts = np.full(len(queries), -1, np.int64)
        elif starts.shape != (len(queries),) or (len(starts) and not -1 <= starts.min() <= starts.max() < rows):
            raise ValueError(f"starts must be [{len(queries)}] rows in -1..{rows - 1}; got {starts}")
        starts = np.ascontiguousarray(starts, np.int64)
        found = np.empty((len(queries), k), np.int64)
        breadth = max(1, min(max(k, breadth), rows))
        bits = max(_SLOT_BITS, (4 * int(self._graph.widths[1])).bit_length())  # room for a first row and its neighbours
        queries = np.ascontiguousarray(queries, np.float32)
        _walk(queries, starts, *self._graph[:-1], self._codes, self._factors, breadth, bits, found)
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
def _slot(row: Any, bits: int) -> Any:
    """Of 2 ** bits: Fibonacci hashing (Knuth, volume 3, section 6.4)."""
    return ((row * 0x9E3779B1) & 0xFFFFFFFF) >> (32 - bits)


@njit(error_model="numpy")
def _nearest(
    query: Any, neighbours: Any, offsets: Any, widths: Any, entry: Any, top: int, codes: Any, factors: Any
) -> Any:
    """Uphill on the levels above the lowest: the row where that ends, and its score."""
    row_bytes = codes.shape[1] * codes.itemsize
    ahead = min(row_bytes, _MOST_AHEAD)
    best, score = entry, _score(query, codes, factors, entry)
    for level in range(top, 0, -1):
        moved = True
        while moved:
            moved = False
            begin = offsets[best] + widths[level]
            end = min(offsets[best] + widths[level + 1], offsets[best + 1])
            for j in range(begin, end):
                if neighbours[j] >= 0:
                    prefetch_from(codes.ctypes.data + neighbours[j] * row_bytes, ahead)
            for j in range(begin, end):
                row = neighbours[j]
                if row < 0:
                    break
                other = _score(query, codes, factors, row)
                if other > score:
                    best, score, moved = np.int64(row), other, True
    return best, score


@njit(error_model="numpy")
def _note(met: Any, bits: int, number: int, row: Any) -> bool:
    """Note that query `number` has met a row; false if it had. A slot is free where another query has written it."""
    slot = _slot(row, bits)
    while met[slot] >> 32 == number and met[slot] & 0xFFFFFFFF != row:
        slot = (slot + 1) & (len(met) - 1)
    if met[slot] >> 32 == number:
        return False
    met[slot] = (number << 32) | row
    return True


@njit(error_model="numpy")
def _doubled(met: Any, bits: int, number: int) -> Any:
    larger = np.zeros(2 * len(met), np.int64)
    for note in met:
        if note >> 32 == number:
            _note(larger, bits + 1, number, note & 0xFFFFFFFF)
    return larger


@njit(error_model="numpy")
def _place(rows: Any, scores: Any, expanded: Any, num: int, row: Any, score: Any) -> Any:
    """Insert a row, not yet expanded, among the best `num`, or in place of the last where all are taken; its place."""
    place = min(num, len(rows) - 1)
    while place > 0 and scores[place - 1] < score:
        rows[place], scores[place] = rows[place - 1], scores[place - 1]
        expanded[place] = expanded[place - 1]
        place -= 1
    rows[place], scores[place], expanded[place] = row, score, False
    return place


def _walk_of(codes: Any) -> Any:
    return types.void(
        types.Array(types.float32, 2, "C", readonly=True),
        _INT64S_IN,
        types.Array(types.int32, 1, "C", readonly=True),
        _INT64S_IN,
        _INT64S_IN,
        types.int64,
        types.int64,
        types.Array(codes, 2, "C", readonly=True),
        _FLOATS_IN,
        types.int64,
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
    starts: Any,
    neighbours: Any,
    offsets: Any,
    widths: Any,
    entry: int,
    top: int,
    codes: Any,
    factors: Any,
    breadth: int,
    bits: int,
    found: Any,
) -> None:
    """Algorithm 5 of Malkov and Yashunin (2018), with W as a sorted list that also says which rows are candidates.

    Candidates beyond the last of W are never looked at, so that W holds all of C that matters. Which rows a query has
    met is kept in a hash table, since a note per row of the catalogue would have to be cleared.
    """
    row_bytes = codes.shape[1] * codes.itemsize
    ahead = min(row_bytes, _MOST_AHEAD)
    rows, scores = np.empty(breadth, np.int64), np.empty(breadth, np.float32)
    expanded = np.empty(breadth, np.bool_)
    fresh = np.empty(widths[1], np.int64)
    met = np.zeros(1 << bits, np.int64)  # query number << 32 | row
    for i in range(len(queries)):
        if entry < 0:
            found[i] = -1
            continue
        query, number = queries[i], i + 1
        if starts[i] >= 0:
            row, score = starts[i], _score(query, codes, factors, starts[i])
        else:
            row, score = _nearest(query, neighbours, offsets, widths, entry, top, codes, factors)
        rows[0], scores[0], expanded[0] = row, score, False
        _note(met, bits, number, row)
        num, num_met, current = 1, 1, 0
        while current < num:
            expanded[current] = True
            begin = offsets[rows[current]]
            num_fresh = 0
            for j in range(begin, begin + widths[1]):
                row = np.int64(neighbours[j])
                if row < 0:
                    break
                if _note(met, bits, number, row):
                    fresh[num_fresh] = row
                    num_fresh += 1
                    prefetch_from(codes.ctypes.data + row * row_bytes, ahead)
            num_met += num_fresh
            if 2 * (num_met + len(fresh)) > len(met):
                met = _doubled(met, bits, number)
                bits += 1
            current += 1
            for j in range(num_fresh):
                score = _score(query, codes, factors, fresh[j])
                if num < breadth or score > scores[num - 1]:
                    current = min(current, _place(rows, scores, expanded, num, fresh[j], score))
                    num = min(num + 1, breadth)
            while current < num and expanded[current]:
                current += 1
            if current < num:
                prefetch_from(neighbours.ctypes.data + 4 * offsets[rows[current]], min(4 * widths[1], _MOST_AHEAD))
        for j in range(found.shape[1]):
            found[i, j] = rows[j] if j < num else -1

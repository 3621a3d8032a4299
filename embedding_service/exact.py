"""Exact nearest vectors: the yardstick that approximate search is held against, and the fall-back where it fails.

Scores are computed in float64 and rounded to float32, so that the score of a pair does not depend on what it was
computed together with: one query or a thousand, one candidate or all. Ties therefore are ties, and go to the lower row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

Metric = Literal["ip", "cosine"]
Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]


class Vectors(Protocol):
    """A set of float32 vectors that may be larger than memory; row i is the vector of catalogue row i."""

    @property
    def rows(self) -> int: ...

    @property
    def dim(self) -> int: ...

    def take(self, rows: npt.NDArray[np.integer]) -> Float32:
        """float32 [*rows.shape, dim]"""
        ...

    def chunks(self, size: int = 65_536) -> Iterator[tuple[int, Float32]]:
        """(first row, float32 [at most size, dim]) pairs that cover all rows in order."""
        ...


class ArrayVectors:
    """`Vectors` over an array in memory, float32 [rows, dim]."""

    def __init__(self, array: Float32) -> None:
        self.array = array
        self.rows, self.dim = array.shape

    def take(self, rows: npt.NDArray[np.integer]) -> Float32:
        taken: Float32 = self.array[rows]
        return taken

    def chunks(self, size: int = 65_536) -> Iterator[tuple[int, Float32]]:
        for start in range(0, self.rows, size):
            yield start, self.array[start : start + size]


def exact_search(
    queries: Float32,
    vectors: Vectors | Float32,
    k: int,
    *,
    metric: Metric = "ip",
    query_block: int = 256,
    row_block: int = 16_384,
) -> tuple[Float32, Int64]:
    """The min(k, rows) best rows of every query, best first, equal scores by row: scores float32 and rows int64 [n, k].

    queries: float32 [n, dim]. Memory: one decoded chunk of vectors (row_block x dim) and query_block x row_block
    scores. The arithmetic is one blocked matrix product.
    """
    if isinstance(vectors, np.ndarray):
        vectors = ArrayVectors(vectors)
    k = min(k, vectors.rows)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    rows = np.full((len(queries), k), -1, np.int64)
    wide = _prepared(queries, metric)
    for start, chunk in vectors.chunks(row_block):
        columns = _prepared(chunk, metric).T
        for first in range(0, len(queries), query_block):
            block = slice(first, first + query_block)
            _merge(scores[block], rows[block], (wide[block] @ columns).astype(np.float32), start)
    return scores, rows


def pair_scores(queries: Float32, candidates: Float32, metric: Metric) -> Float32:
    """Scores of each query [n, dim] with its own candidates [n, k, dim]: float32 [n, k], as `exact_search` has them."""
    wide = _prepared(queries, metric)
    scores: Float32 = np.matmul(_prepared(candidates, metric), wide[:, :, None])[:, :, 0].astype(np.float32)
    return scores


def unit_length(vectors: Float32) -> Float32:
    """Rows [..., dim] divided by their length; a zero row stays zero."""
    return _prepared(vectors, "cosine").astype(np.float32)


def _prepared(vectors: Float32, metric: Metric) -> npt.NDArray[np.float64]:
    """float64, and for cosine of unit length: what remains is an inner product."""
    wide = vectors.astype(np.float64)
    if metric == "cosine":
        norms = np.sqrt(np.square(wide).sum(axis=-1, keepdims=True))
        wide /= np.maximum(norms, 1e-30)
    return wide


def _merge(best: Float32, best_rows: Int64, scores: Float32, start: int) -> None:
    """Merge a block of scores [n, b], those of rows start..start + b - 1, into the best so far [n, k], in place.

    Slow formula: sort (score descending, row ascending) over both and take k. Here only what beats the k-th best so
    far is sorted: rows come in ascending order, so that an equal score is a later row and loses.
    """
    n, k = best.shape
    keep = scores > best[:, -1:]
    if np.count_nonzero(keep) > 4 * n * k and k < scores.shape[1]:
        keep &= scores >= np.partition(scores, -k, axis=1)[:, -k, None]
    query, column = np.nonzero(keep)
    if len(query) == 0:
        return
    owners = np.concatenate([np.repeat(np.arange(n), k), query])
    values = np.concatenate([best.ravel(), scores[query, column]])
    rows = np.concatenate([best_rows.ravel(), column + start])
    order = np.lexsort((rows, -values, owners))
    sizes = k + np.bincount(query, minlength=n)
    first = order[(np.cumsum(sizes) - sizes)[:, None] + np.arange(k)]
    best[:], best_rows[:] = values[first], rows[first]

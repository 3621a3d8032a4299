"""The rows that a query may be answered with, and the search among them: through an index, or exactly."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from embedding_service.exact import Float32, Int64, Metric, exact_search, pair_scores
from embedding_service.index import VectorIndex
from embedding_service.ragged import Ragged
from embedding_service.vectors import VectorSet

_SPARE = 8  # rows fetched beyond k from an exhaustive index, so that rounding does not decide who is k-th


class Candidates:
    """Rows 0..rows - 1 with their stored vectors; `index` None searches exactly.

    What an index finds is scored again from the stored vectors: an answer's scores are the same through any index, in
    any batch, and by exact search, and so is the order of what was found (score descending, then row).
    """

    def __init__(self, vectors: VectorSet, metric: Metric, index: VectorIndex | None) -> None:
        self.rows, self.dim = vectors.rows, vectors.dim
        self.vectors = vectors
        self._metric: Metric = metric
        self._index = index

    def search(self, queries: Float32, k: int) -> tuple[Float32, Int64]:
        """The best min(k, rows) rows of queries [n, dim]: scores float32 and rows int64 [n, min(k, rows)], no padding.

        Queries for which the index finds fewer rows than that (a graph's unreachable corner, few lists probed) are
        answered exactly.
        """
        k = min(k, self.rows)
        if self._index is None:
            return exact_search(queries, self.vectors, k, metric=self._metric)
        fetch = min(self.rows, k + _SPARE) if self._index.exhaustive else k
        _, rows = self._index.search(queries, fetch)
        lacking = rows[:, -1] < 0
        scores = pair_scores(queries, self.vectors.take(np.maximum(rows, 0) if lacking.any() else rows), self._metric)
        order = np.lexsort((rows, -scores), axis=1)
        line = np.arange(len(order))[:, None]
        scores, rows = scores[line, order], rows[line, order]
        if fetch < self.rows and self._index.exhaustive:  # which of many equal rows were fetched was FAISS's whim
            lacking |= scores[:, -1] == scores[:, k - 1]
        scores, rows = scores[:, :k], rows[:, :k]
        if lacking.any():
            scores[lacking], rows[lacking] = exact_search(queries[lacking], self.vectors, k, metric=self._metric)
        return scores, rows

    def search_unseen(self, queries: Float32, k: int, seen: Ragged | None) -> tuple[Float32, Int64]:
        """As `search`, without the rows (int64, any) that `seen` lists for each query.

        Fills k places wherever that many rows are left; else the end is padded with row -1 and score -inf.
        """
        if seen is None:
            return self.search(queries, k)
        k = min(k, self.rows)
        fetch = num_fetched(k, seen.lengths)
        sizes = np.unique(fetch)
        if len(sizes) == 1:
            return first_unseen(*self.search(queries, int(sizes[0])), seen, k)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        rows = np.full((len(queries), k), -1, np.int64)
        for size in sizes:
            members = np.flatnonzero(fetch == size)
            found = self.search(queries[members], int(size))
            scores[members], rows[members] = first_unseen(*found, seen.take(members), k)
        return scores, rows


def num_fetched(k: int, num_seen: npt.NDArray[np.int64]) -> Int64:
    """How many rows to look up so that k unseen ones are among them: int64 [n].

    A function of the query alone, so that its answer does not depend on its batch; rounded up to few distinct values,
    so that a batch is searched in few groups.
    """
    return k + np.where(num_seen > 0, 2 ** np.ceil(np.log2(np.maximum(num_seen, 4))), 0).astype(np.int64)


def first_unseen(scores: Float32, rows: Int64, seen: Ragged, k: int) -> tuple[Float32, Int64]:
    """The first k of each query's m >= k ranked rows [n, m] that `seen` does not list, padded with -1 and -inf."""
    n = len(rows)
    span = int(max(rows.max(initial=0), seen.values.max(initial=0))) + 2  # (query, row) as one number; -1 stays apart
    pairs = rows + 1 + np.arange(n)[:, None] * span
    excluded = np.isin(pairs, seen.values + 1 + seen.owners() * span, kind="sort")
    order = np.argsort(excluded, axis=1, kind="stable")[:, :k]
    line = np.arange(n)[:, None]
    left = ~excluded[line, order]
    return np.where(left, scores[line, order], np.float32(-np.inf)), np.where(left, rows[line, order], -1)

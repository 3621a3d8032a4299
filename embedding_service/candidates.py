"""The rows that a query may be answered with, and the search among them: through an index, or exactly."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor

import numpy as np
import numpy.typing as npt

from embedding_service import rank_kernels as kernels
from embedding_service.allowed import search_allowed
from embedding_service.attributes import Mask
from embedding_service.exact import Float32, Int64, Metric, exact_search
from embedding_service.index import VectorIndex
from embedding_service.ragged import Ragged
from embedding_service.vectors import VectorSet

_SPARE = 8  # rows fetched beyond k from an exhaustive index, so that rounding does not decide who is k-th
_SHARE = 16  # queries that a thread takes at a time at least
_ROWS_PER_QUERY = 16_384  # and one for so many rows: FAISS clears a note per row for each share
_NO_ROWS = np.empty(0, np.int64)


class Candidates:
    """Rows 0..rows - 1 with their stored vectors; `index` None searches exactly.

    What an index finds is scored again from the stored vectors: an answer's scores are the same through any index, in
    any batch, and by exact search, and so is the order of what was found (score descending, then row).

    The calling thread and `threads` - 1 of `pool` share a batch. FAISS's own threads would share out the search but not
    the scoring, and spin for a while afterwards on cores that a server needs.
    """

    def __init__(
        self,
        vectors: VectorSet,
        metric: Metric,
        index: VectorIndex | None,
        pool: Executor | None = None,
        threads: int = 1,
    ) -> None:
        self.rows, self.dim = vectors.rows, vectors.dim
        self.vectors = vectors
        self._metric: Metric = metric
        self._index = index
        self._walk = None if index is None else index.walk_over(vectors)
        self._pool, self._threads = pool, 1 if index is None or index.on_gpu else threads

    def search(self, queries: Float32, k: int) -> tuple[Float32, Int64]:
        """The best min(k, rows) rows of queries [n, dim]: scores float32 and rows int64 [n, min(k, rows)], no padding.

        Queries for which the index finds fewer rows than that (a graph's unreachable corner, few lists probed) are
        answered exactly.
        """
        return self.search_unseen(queries, k, None)

    def search_unseen(
        self, queries: Float32, k: int, seen: Ragged | None, own: Int64 | None = None
    ) -> tuple[Float32, Int64]:
        """As `search`, without the rows (int64, any) that `seen` lists for each query.

        Fills k places wherever that many rows are left; else the end is padded with row -1 and score -inf. `own`: int64
        [n], the rows whose vectors the queries are (-1: none is): a search of a graph by cosine begins there. It finds
        nearly the same; its recall is what tuning and the probe measure. Of allowed rows alone searches begin on top.
        """
        k = min(k, self.rows)
        starts = own if self._walk is not None and self._metric == "cosine" else None
        if seen is None:
            return self._search(queries, k, k, Ragged(_NO_ROWS, np.zeros(len(queries) + 1, np.int64)), starts)
        fetch = num_fetched(k, seen.lengths)
        sizes = set(fetch.tolist())
        if len(sizes) == 1:
            return self._search(queries, sizes.pop(), k, seen, starts)
        scores, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        for size in sizes:
            members = np.flatnonzero(fetch == size)
            those = None if starts is None else starts[members]
            scores[members], rows[members] = self._search(queries[members], size, k, seen.take(members), those)
        return scores, rows

    def search_allowed(
        self, queries: Float32, k: int, allowed: Mask, seen: Ragged | None, *, allowed_rows: Int64 | None = None
    ) -> tuple[Float32, Int64]:
        """As `search_unseen`, of the rows that `allowed` (bool [rows]) has; see `allowed.search_allowed`."""
        return search_allowed(self, self._metric, queries, k, allowed, seen, allowed_rows=allowed_rows)

    def _search(
        self, queries: Float32, wanted: int, k: int, seen: Ragged, starts: Int64 | None
    ) -> tuple[Float32, Int64]:
        """The first k unseen ones of the best `wanted` rows."""
        wanted = min(wanted, self.rows)
        if self._index is None:
            return first_unseen(*exact_search(queries, self.vectors, wanted, metric=self._metric), seen, k)
        scores, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        smallest = _SHARE if self._walk is not None else max(_SHARE, self.rows // _ROWS_PER_QUERY)
        on_loop = asyncio._get_running_loop() is not None  # then it is a moment's work, and the loop holds up a helper
        shares = _shares(len(queries), 1 if on_loop else self._threads, smallest)
        todo = iter(shares)

        def work() -> None:
            for share in todo:  # a list's iterator gives each share to one thread
                hidden = seen if len(shares) == 1 else seen.slice(share.start, share.stop)
                those = None if starts is None else starts[share]
                self._search_share(queries[share], wanted, hidden, those, scores[share], rows[share])

        helpers = [self._pool.submit(work) for _ in range(min(self._threads, len(shares)) - 1)] if self._pool else []
        work()
        for helper in helpers:
            if not helper.cancel():  # one that has not begun is not waited for
                helper.result()
        return scores, rows

    def _search_share(
        self, queries: Float32, wanted: int, seen: Ragged, starts: Int64 | None, scores: Float32, rows: Int64
    ) -> None:
        """`_search` through the index in the calling thread, into scores and rows [n, k]."""
        assert self._index is not None
        # of many equal rows an exhaustive index fetches some: fetch more, and do without it where they still are equal
        # and of what a lossy index finds, the best by their vectors
        fetch = wanted + _SPARE if self._index.exhaustive else wanted * self._index.rescore
        fetch = min(self.rows, fetch)
        if self._walk is not None:
            found = self._walk.search_rows(queries, fetch, self._index.breadth, starts)
        else:
            found = self._index.search_rows(queries, fetch)
        lacking = np.empty(len(queries), np.bool_)
        if kernels.best_unseen(
            queries, found, *self.vectors.stored, self._metric == "cosine", wanted, self._index.exhaustive,
            seen.values, seen.offsets, scores, rows, lacking,
        ):  # fmt: skip
            members = np.flatnonzero(lacking)
            exact = exact_search(queries[members], self.vectors, wanted, metric=self._metric)
            scores[members], rows[members] = first_unseen(*exact, seen.take(members), scores.shape[1])


def _shares(num: int, threads: int, smallest: int) -> list[slice]:
    """Large shares first, small ones last, so that all threads end together."""
    if threads == 1:
        return [slice(0, num)]
    shares, start = [], 0
    while start < num:
        size = max(smallest, (num - start) // (2 * threads))
        shares.append(slice(start, min(num, start + size)))
        start += size
    return shares


def num_fetched(k: int, num_seen: npt.NDArray[np.int64]) -> Int64:
    """How many rows to look up so that k unseen ones are among them: int64 [n].

    A function of the query alone, so that its answer does not depend on its batch; rounded up to few distinct values,
    so that a batch is searched in few groups.
    """
    powers = [1 << max(2, (seen - 1).bit_length()) if seen else 0 for seen in num_seen.tolist()]
    return k + np.array(powers, np.int64)


def first_unseen(scores: Float32, rows: Int64, seen: Ragged, k: int) -> tuple[Float32, Int64]:
    """The first k of each query's m >= k ranked rows [n, m] that `seen` does not list, padded with -1 and -inf."""
    out_scores, out_rows = np.empty((len(rows), k), np.float32), np.empty((len(rows), k), np.int64)
    kernels.first_unseen(scores, rows, seen.values, seen.offsets, out_scores, out_rows)
    return out_scores, out_rows

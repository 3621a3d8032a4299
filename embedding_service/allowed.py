"""Search among some of the rows: through the index where many are allowed, exactly where few are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from embedding_service.attributes import Mask
from embedding_service.exact import Float32, Int64, Metric, exact_search
from embedding_service.ragged import Ragged
from embedding_service.vectors import VectorSet

if TYPE_CHECKING:
    from embedding_service.candidates import Candidates

EXACT_ROWS = 20_000  # so few are scored one by one
EXACT_SHARE = 0.02  # of all rows, too: the index would look through fifty for each that it may show
MAX_FETCH = 4096  # rows that are looked up through the index before all allowed ones are scored


def search_allowed(
    candidates: Candidates,
    metric: Metric,
    queries: Float32,
    k: int,
    allowed: Mask,
    seen: Ragged | None = None,
    *,
    allowed_rows: Int64 | None = None,
) -> tuple[Float32, Int64]:
    """The best k of the rows that `allowed` (bool [rows]) has and that `seen` does not list, for queries [n, dim].

    `allowed_rows`: the same rows by number, where the caller knows them.

    Scores float32 and rows int64 [n, min(k, rows)], best first, the end padded with -inf and -1 only where no more rows
    are left. Through the index the answer is what a scan of its ranking would find: as many rows are looked up as the
    share of allowed ones makes likely, four times as many where that was too few, and in the end all are scored.
    """
    k, n = min(k, candidates.rows), len(queries)
    scores, rows = np.full((n, k), -np.inf, np.float32), np.full((n, k), -1, np.int64)
    few = np.flatnonzero(allowed) if allowed_rows is None else allowed_rows
    lacking = np.arange(n)
    share = len(few) / candidates.rows
    if len(few) > EXACT_ROWS and share > EXACT_SHARE:
        most_seen = int(seen.lengths.max(initial=0)) if seen is not None else 0
        fetch = math.ceil(1.3 * (k + most_seen) / share) + 16
        while len(lacking) and fetch <= MAX_FETCH:
            found = candidates.search(queries[lacking], fetch)
            lacking = _fill(scores, rows, lacking, found, allowed, seen)
            fetch *= 4
    if len(lacking):
        wanted = min(len(few), k + (int(seen.lengths.max(initial=0)) if seen is not None else 0))
        if wanted:
            best, place = exact_search(queries[lacking], _Rows(candidates.vectors, few), wanted, metric=metric)
            _fill(scores, rows, lacking, (best, few[place]), allowed, seen)
    return scores, rows


def _fill(
    scores: Float32,
    rows: Int64,
    queries: Int64,
    found: tuple[Float32, Int64],
    allowed: Mask,
    seen: Ragged | None,
) -> Int64:
    """Put the first allowed ones of what was found for `queries` in their places; which have fewer than k."""
    k, lacking = scores.shape[1], []
    for query, best, order in zip(queries, *found, strict=True):
        keep = allowed[order] & (order >= 0)
        if seen is not None:
            keep &= ~np.isin(order, seen.values[seen.offsets[query] : seen.offsets[query + 1]])
        chosen = np.flatnonzero(keep)[:k]
        scores[query], rows[query] = -np.inf, -1
        scores[query, : len(chosen)], rows[query, : len(chosen)] = best[chosen], order[chosen]
        if len(chosen) < k:
            lacking.append(query)
    return np.array(lacking, np.int64)


class _Rows:
    """Some rows of a vector set, as `exact.Vectors`."""

    def __init__(self, vectors: VectorSet, chosen: Int64) -> None:
        self._vectors, self._chosen = vectors, chosen
        self.rows, self.dim = len(chosen), vectors.dim

    def take(self, rows: npt.NDArray[np.integer]) -> Float32:
        return self._vectors.take(self._chosen[rows])

    def chunks(self, size: int = 65_536) -> Iterator[tuple[int, Float32]]:
        for start in range(0, self.rows, size):
            yield start, self._vectors.take(self._chosen[start : start + size])

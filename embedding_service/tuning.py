"""An index whose search parameter is set by a recall target, measured against exact search."""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np

from cluster.errors import SettingError
from embedding_service.exact import ArrayVectors, Float32, Int64, Metric, Vectors, exact_search, pair_scores
from embedding_service.index import VectorIndex

TUNING_QUERIES = 1000
LONG_SEARCH = 128  # a graph that needs a larger efSearch than this is tried in its other arrangement
REFINE_FACTOR = 8  # `...,RFlat`: this many times k candidates are scored exactly

_log = logging.getLogger(__name__)


def tuned_index(
    vectors: Vectors | Float32,
    *,
    metric: Metric,
    factory: str = "auto",
    recall_target: float,
    recall_k: int,
    queries: Float32 | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> tuple[VectorIndex, dict[str, Any]]:
    """An index whose search parameter is doubled until recall@recall_k against exact search reaches `recall_target`.

    Measured on up to 1000 of `queries` [m, dim]; without them on stored vectors, each without itself. Returns the index
    and its record: the manifest's `recall` (value, k, target, met, queries, num_queries) and `build_seconds`, the time
    of building and tuning. If nothing meets the target, the cheapest setting within .005 of the best recall is kept,
    the record says so, and a warning is logged.
    """
    if isinstance(vectors, np.ndarray):
        vectors = ArrayVectors(vectors)
    began = time.perf_counter()
    test = _RecallTest(vectors, metric, recall_k, queries, seed)
    options: dict[str, Any] = {"metric": metric, "factory": factory, "seed": seed, "threads": threads}
    index = VectorIndex.build(vectors, **options)
    value = _tune(index, test, recall_target)
    if index.arrangement == "centred" and (value < recall_target or index.parameters["efSearch"] > LONG_SEARCH):
        other = VectorIndex.build(vectors, arrangement="augmented", **options)
        other_value = _tune(other, test, recall_target)
        met, other_met = value >= recall_target, other_value >= recall_target
        cheaper = other.parameters["efSearch"] < index.parameters["efSearch"]
        if (other_met and (cheaper or not met)) or (not met and other_value > value):
            index, value = other, other_value
    if value < recall_target:
        _log.warning(
            "index %s reaches recall@%d %.4f, not the target %.4f; best at %s",
            index.factory, test.k, value, recall_target, index.parameters or "no search parameter",
        )  # fmt: skip
    recall = {
        "value": value,
        "k": test.k,
        "target": recall_target,
        "met": value >= recall_target,
        "queries": test.source,
        "num_queries": len(test.queries),
    }
    return index, {"recall": recall, "build_seconds": time.perf_counter() - began}


class _RecallTest:
    """Queries with their exact answers. A found row counts if its exact score is at least the k-th best: ties do."""

    def __init__(self, vectors: Vectors, metric: Metric, k: int, queries: Float32 | None, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.source = "stored" if queries is None else "given"
        self._own = None
        if queries is None:
            self._own = rng.choice(vectors.rows, min(TUNING_QUERIES, vectors.rows), replace=False)
            queries = vectors.take(self._own)
        elif len(queries) > TUNING_QUERIES:
            queries = queries[rng.choice(len(queries), TUNING_QUERIES, replace=False)]
        if len(queries) == 0:
            raise SettingError("export.recall_target", "there are no queries to measure recall on")
        self.queries = np.ascontiguousarray(queries, np.float32)
        self._vectors, self._metric = vectors, metric
        self.k = max(1, min(k, vectors.rows - (self._own is not None)))
        best, _ = self._without_own(*exact_search(self.queries, vectors, self._fetch, metric=metric))
        self._threshold = best[:, -1:]

    def recall(self, index: VectorIndex) -> float:
        """Mean over the queries of (true rows among the k found) / k."""
        _, rows = index.search(self.queries, min(self._fetch, self._vectors.rows))
        found = self._vectors.take(np.maximum(rows, 0))
        scores = np.where(rows >= 0, pair_scores(self.queries, found, self._metric), np.float32(-np.inf))
        scores, _ = self._without_own(scores, rows)
        return float(np.mean(scores >= self._threshold))

    @property
    def _fetch(self) -> int:
        return self.k + (self._own is not None)

    def _without_own(self, scores: Float32, rows: Int64) -> tuple[Float32, Int64]:
        """The first k of each query that are not the query itself."""
        if self._own is None:
            return scores, rows
        order = np.argsort(rows == self._own[:, None], axis=1, kind="stable")[:, : self.k]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def _tune(index: VectorIndex, test: _RecallTest, target: float) -> float:
    """Set the smallest doubling of the index's knob that reaches `target` (or nearly the best); returns its recall."""
    if "RFlat" in index.factory or "Refine" in index.factory:
        index.set_parameters({"k_factor_rf": REFINE_FACTOR})
    if index.knob is None:
        return test.recall(index)
    name, limit = index.knob
    value = 1 if name == "nprobe" else 16
    measured: list[tuple[int, float]] = []
    while not measured or (measured[-1][1] < target and measured[-1][0] < limit and not _stalled(measured)):
        index.set_parameters({name: min(value, limit)})
        measured.append((min(value, limit), test.recall(index)))
        value *= 2
    if measured[-1][1] < target:
        best = max(recall for _, recall in measured)
        measured = [next(entry for entry in measured if entry[1] >= best - 0.005)]
    index.set_parameters({name: measured[-1][0]})
    return measured[-1][1]


def _stalled(measured: list[tuple[int, float]]) -> bool:
    """Whether the last two doublings brought nothing: what is missing was lost to quantisation."""
    return len(measured) > 2 and measured[-1][1] - measured[-3][1] < 0.0005

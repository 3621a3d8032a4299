"""An index whose search parameters are set by a recall target, as it will be served, at the lowest latency.

Recall is measured through `Candidates`, which is what answers when serving: rows fetched, scored anew by the stored
vectors, and searched exactly where the index finds too few. Two parameters may have to be set:

    knob   nprobe or efSearch: how much is searched. Recall rises with it on every fixed set of queries (of nprobe
           strictly, of efSearch nearly), so that the least value that meets the target is found by bisection between a
           value that fails and one that does. Nothing is interpolated: what is chosen was measured, on all queries.
    depth  rescore or k_factor_rf, where codes lose something: how many times k rows are scored anew. Each power of two
           has its own least knob; of these pairs the one with the lowest measured latency is taken.

A recall over m queries has the standard error s / sqrt(m), s the standard deviation of the queries' own recalls. For
a true recall R at k, s^2 lies between R (1 - R) / k (rows are missed independently) and R (1 - R) (a query loses all or
nothing); measured s for R = .95 and k = 10 are .09 to .14. What is tuned on m queries and looked at on m others differs
by at most e, with z standard errors' confidence, where m = 2 (z s / e)^2: for s = .14 and e = .005 that is 6000 queries
(z = 1.96) or 14 000 (z = 3). Hence TUNING_QUERIES; the record's `half_width` is 1.96 s / sqrt(m).
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import SettingError
from cluster.rank import num_cores
from embedding_service import rank_kernels as kernels
from embedding_service.candidates import Candidates
from embedding_service.exact import Float32, Int64, Metric
from embedding_service.index import Device, VectorIndex, nearest_rows, set_threads
from embedding_service.index_plan import estimate
from embedding_service.ragged import Ragged
from embedding_service.vectors import VectorSet

TUNING_QUERIES = 20_000
LEAST_QUERIES = 1000  # even where exact answers for them take long
EXACT_SCORES = 2e11  # rows x queries that exact answers are computed for; fewer queries where it would be more
SAMPLE = 1000  # queries that find the region, and measure the curve
TIMED = 64  # queries that are timed, one at a time in one thread
LONG_SEARCH = 128  # a graph that needs a larger efSearch than this is tried in its other arrangement
DEPTHS = (1, 2, 4, 8, 16, 32, 64)
CURVE_SPAN = 8.0  # the curve goes on to this many times the latency of what was chosen

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Queries:
    """What recall is measured on: vectors float32 [m, dim], and where they come from.

    `own` int64 [m]: the rows whose vectors these are, which are no answers to themselves, or -1; None: they are none.
    """

    vectors: Float32
    source: str = "given"
    own: Int64 | None = None

    @classmethod
    def of_rows(cls, vectors: VectorSet, rows: Int64, source: str = "given") -> Queries:
        """Rows that ask for their neighbours."""
        return cls(vectors.take(rows), source, np.ascontiguousarray(rows, np.int64))

    def take(self, members: np.ndarray | slice) -> Queries:
        return Queries(self.vectors[members], self.source, None if self.own is None else self.own[members])

    def within(self, rows: range) -> Queries:
        """The same queries for an index over some rows, which counts them from 0; own rows outside of it are -1."""
        if self.own is None:
            return self
        inside = (self.own >= rows.start) & (self.own < rows.stop)
        return Queries(self.vectors, self.source, np.where(inside, self.own - rows.start, -1))


def tuned_index(
    vectors: VectorSet | Float32,
    *,
    metric: Metric,
    factory: str = "auto",
    recall_target: float,
    recall_k: int,
    queries: Queries | Float32 | None = None,
    seed: int = 0,
    threads: int | None = None,
    device: Device = "auto",
    memory_bytes: int = 0,
    on_progress: Callable[[str, float], None] = lambda text, share: None,
) -> tuple[VectorIndex, dict[str, Any]]:
    """An index that reaches recall@recall_k `recall_target` against exact search at the lowest latency.

    Measured on `queries` [m, dim], or a sample of them; without them on stored vectors, each without itself. Returns
    the index and its record, which goes into the manifest: `recall` (value, half_width, k, target, met, queries,
    num_queries), `curve` (points of parameters, recall and microseconds per query), `estimate` (of the build, by
    `index_plan`) and what it took: `build_bytes` of this process's own memory and `build_seconds`. If nothing meets the
    target, the cheapest setting within .005 of the best recall is kept, the record says so, and a warning is logged.
    `on_progress` is told a text and the share that is done.
    """
    if isinstance(vectors, np.ndarray):
        vectors = VectorSet(np.ascontiguousarray(vectors, np.float32), None, "fp32")
    set_threads(threads)
    test = RecallTest(vectors, metric, recall_k, _sample(queries, vectors, seed), threads or num_cores())

    def build(arrangement: Any = None) -> tuple[VectorIndex, dict[str, Any]]:
        began, memory = time.perf_counter(), [_own_memory()]

        def adding(share: float) -> None:
            memory.append(_own_memory())
            on_progress(f"adding {vectors.rows:,} rows to the index", share)

        index = VectorIndex.build(
            vectors, metric=metric, factory=factory, arrangement=arrangement, threads=threads, seed=seed,
            device=device, memory_bytes=memory_bytes, on_share=adding,
        )  # fmt: skip
        return index, {"seconds": time.perf_counter() - began, "build_bytes": max(memory) - memory[0]}

    index, took = build()
    on_progress(f"tuning {index.factory} to recall@{test.k} {recall_target}", 1.0)
    value = _tune(index, test, recall_target)
    if index.arrangement == "centred" and (value < recall_target or index.parameters["efSearch"] > LONG_SEARCH):
        other, other_took = build("augmented")
        other_value = _tune(other, test, recall_target)
        met, other_met = value >= recall_target, other_value >= recall_target
        cheaper = other.parameters["efSearch"] < index.parameters["efSearch"]
        if (other_met and (cheaper or not met)) or (not met and other_value > value):
            index, took = other, other_took
    expected = estimate(index.factory, vectors.rows, vectors.dim, threads or num_cores())
    return index, {
        **_described(index, test, recall_target),
        "estimate": None if expected is None else vars(expected),
        "build_bytes": took["build_bytes"],
        "build_seconds": took["seconds"],
    }


def tune(index: VectorIndex, test: RecallTest, target: float) -> dict[str, Any]:
    """Set the parameters of a built index; returns the `recall` and the `curve` of its record."""
    _tune(index, test, target)
    return _described(index, test, target)


def _described(index: VectorIndex, test: RecallTest, target: float) -> dict[str, Any]:
    recalls = test.recalls(index, slice(0, SAMPLE if index.exhaustive else None))
    value = float(recalls.mean())
    if value < target:
        _log.warning(
            "index %s reaches recall@%d %.4f, not the target %.4f; best at %s",
            index.factory, test.k, value, target, index.parameters or "no search parameter",
        )  # fmt: skip
    recall = {
        "value": value,
        "half_width": float(1.96 * recalls.std() / len(recalls) ** 0.5),
        "k": test.k,
        "target": target,
        "met": value >= target,
        "queries": test.queries.source,
        "num_queries": len(recalls),
    }
    return {"recall": recall, "curve": curve(index, test)}


class RecallTest:
    """Queries with the scores that their k best rows have at least. A found row counts if its score is as high: ties
    do.
    """

    def __init__(
        self,
        vectors: VectorSet,
        metric: Metric,
        k: int,
        queries: Queries,
        threads: int,
        *,
        threshold: Float32 | None = None,
    ) -> None:
        """`threshold`: that of an earlier test of the same; else it is computed. Raises SettingError if there are no
        queries.
        """
        if len(queries.vectors) == 0:
            raise SettingError("export.recall_target", "there are no queries to measure recall on")
        self.queries = queries
        self.k = max(1, min(k, vectors.rows - (queries.own is not None)))
        self._vectors, self._metric, self._threads = vectors, metric, threads
        if threshold is None:
            parts = [self._kth_scores(queries.take(slice(i, i + 4096))) for i in range(0, len(queries.vectors), 4096)]
            threshold = np.concatenate(parts)
        self.threshold = threshold

    def recalls(self, index: VectorIndex, members: slice = slice(None)) -> np.ndarray:
        """For each query (true rows among the k found) / k: float64 [m]."""
        queries, threads = self.queries.take(members), self._threads
        with ThreadPoolExecutor(max(1, threads - 1)) as pool:
            candidates = Candidates(self._vectors, self._metric, index, pool, threads)
            scores, _ = candidates.search_unseen(queries.vectors, self.k, _hidden(queries), queries.own)
        found: np.ndarray = (scores >= self.threshold[members, None]).mean(axis=1)
        return found

    def recall(self, index: VectorIndex, members: slice = slice(None)) -> float:
        """The mean of `recalls`."""
        return float(self.recalls(index, members).mean())

    def microseconds(self, index: VectorIndex) -> float:
        """Of a query, asked alone in one thread: the mean over up to 64 of the fastest of three times."""
        candidates = Candidates(self._vectors, self._metric, index)
        asked = [self.queries.take(slice(i, i + 1)) for i in range(min(TIMED, len(self.queries.vectors)))]
        calls = [(one.vectors, _hidden(one), one.own) for one in asked]
        seconds = np.empty((3, len(calls)))
        for times in seconds:
            for i, (query, hidden, own) in enumerate(calls):
                began = time.perf_counter()
                candidates.search_unseen(query, self.k, hidden, own)
                times[i] = time.perf_counter() - began
        return 1e6 * float(seconds.min(axis=0).mean())

    def _kth_scores(self, queries: Queries) -> Float32:
        """The k-th best score of each query, float32 [m]: found in float32, scored as `Candidates` does."""
        own = queries.own is not None
        rows = nearest_rows(self._vectors, queries.vectors, self.k + own, self._metric)
        hidden = _hidden(queries) or Ragged(np.empty(0, np.int64), np.zeros(len(rows) + 1, np.int64))
        scores, best = (np.empty((len(rows), self.k), kind) for kind in (np.float32, np.int64))
        kernels.best_unseen(
            np.ascontiguousarray(queries.vectors), rows, *self._vectors.stored, self._metric == "cosine",
            rows.shape[1], False, hidden.values, hidden.offsets, scores, best, np.empty(len(rows), np.bool_),
        )  # fmt: skip
        last: Float32 = scores[:, -1].copy()
        return last


def _hidden(queries: Queries) -> Ragged | None:
    """Each query's own row, as what has been seen."""
    return None if queries.own is None else Ragged(queries.own, np.arange(len(queries.own) + 1, dtype=np.int64))


def _sample(queries: Queries | Float32 | None, vectors: VectorSet, seed: int) -> Queries:
    """At most as many queries as can be answered exactly in reasonable time, chosen by `seed`."""
    rng = np.random.default_rng(seed)
    most = int(max(LEAST_QUERIES, min(TUNING_QUERIES, EXACT_SCORES / vectors.rows)))
    if queries is None:
        rows = rng.choice(vectors.rows, min(most, vectors.rows), replace=False)
        return Queries.of_rows(vectors, rows, "stored")
    if isinstance(queries, np.ndarray):
        queries = Queries(np.ascontiguousarray(queries, np.float32))
    if len(queries.vectors) > most:
        queries = queries.take(rng.choice(len(queries.vectors), most, replace=False))
    return queries


def _tune(index: VectorIndex, test: RecallTest, target: float) -> float:
    """Set the parameters of `index` to what reaches `target` (or nearly the best) fastest; returns its recall."""
    if index.depth is None:
        return _tune_knob(index, test, target)
    if index.knob is None:
        return _set_least(index, test, target, index.depth, DEPTHS[0], DEPTHS[-1])
    best: tuple[float, int] | None = None
    reached: dict[int, float] = {}
    sample = slice(0, SAMPLE)
    for depth in DEPTHS:
        index.set_parameters({index.depth: depth})
        reached[depth] = _tune_knob(index, test, target, sample)
        if reached[depth] < target:
            if len(reached) > 2 and best is None and reached[depth] - reached[depth // 4] < 0.0005:
                break  # what is missing is not lost to the codes
            continue
        latency = test.microseconds(index)
        if best is not None and latency > 1.2 * best[0]:
            break
        if best is None or latency < 0.95 * best[0]:  # a deeper one must be worth it
            best = latency, depth
    depth = best[1] if best is not None else next(d for d in DEPTHS if reached[d] >= max(reached.values()) - 0.005)
    index.set_parameters({index.depth: depth})
    return _tune_knob(index, test, target)


def _tune_knob(index: VectorIndex, test: RecallTest, target: float, members: slice = slice(None)) -> float:
    """Set the least value of the index's knob, if it has one, that reaches `target`; returns the recall."""
    if index.knob is None:
        return test.recall(index, members)
    name, limit = index.knob
    return _set_least(index, test, target, name, 1 if name == "nprobe" else min(test.k, limit), limit, members)


def _set_least(
    index: VectorIndex,
    test: RecallTest,
    target: float,
    name: str,
    low: int,
    high: int,
    members: slice = slice(None),
) -> float:
    """Set parameter `name` to its least value in low..high that reaches `target` on the queries `members`.

    Doubled on a sample until it does, then bisected on all `members` between a value that fails and one that does
    not; if none does, the least doubling within .005 of the best recall is set. Returns the recall.
    """
    sample = slice(0, min(SAMPLE, members.stop or SAMPLE))

    def recall(value: int, on: slice) -> float:
        index.set_parameters({name: value})
        return test.recall(index, on)

    coarse: dict[int, float] = {}
    value = low
    while not coarse or (coarse[value] < target and value < high and not _stalled(list(coarse.values()))):
        value = min(high, 2 * value) if coarse else low
        coarse[value] = recall(value, sample)
    if coarse[value] < target:
        value = next(tried for tried, found in coarse.items() if found >= max(coarse.values()) - 0.005)
        return recall(value, members)
    meets, found = value, recall(value, members)
    while found < target and meets < high:  # the sample was luckier than the rest
        meets = min(high, 2 * meets)
        found = recall(meets, members)
    if found < target:
        return found
    fails = low - 1
    for below in _halves(meets, low):  # or less lucky
        if (value_there := recall(below, members)) < target:
            fails = below
            break
        meets, found = below, value_there
    while meets - fails > 1:
        middle = (fails + meets) // 2
        value_there = recall(middle, members)
        if value_there >= target:
            meets, found = middle, value_there
        else:
            fails = middle
    index.set_parameters({name: meets})
    return found


def _halves(value: int, low: int) -> Iterator[int]:
    """value / 2, value / 4... down to `low`."""
    while value > low:
        value = max(low, value // 2)
        yield value


def _stalled(recalls: list[float]) -> bool:
    """Whether the last two doublings brought nothing: what is missing was lost to quantisation."""
    return len(recalls) > 2 and recalls[-1] - recalls[-3] < 0.0005


def curve(index: VectorIndex, test: RecallTest) -> list[dict[str, Any]]:
    """Recall and latency over the knob, the other parameters as they are: doublings of it, and the value it has.

    Points {"parameters", "recall", "microseconds"} in the order of the knob, measured on the same (at most 1000)
    queries; up to where recall ends to rise, or the latency is 8 times that of the value it has.
    """
    chosen = dict(index.parameters)
    name, limit = index.knob or (index.depth, DEPTHS[-1])
    if name is None:
        return [_point(index, test, chosen)]
    values = {min(limit, 1 << i) for i in range(limit.bit_length() + 1)} | {chosen[name]}
    least = 1 if name != "efSearch" else min(test.k, limit)
    own = _point(index, test, chosen)
    points = []
    for value in sorted(value for value in values if value >= least):
        point = own if value == chosen[name] else _point(index, test, {**chosen, name: value})
        points.append(point)
        over = point["microseconds"] > CURVE_SPAN * own["microseconds"]
        level = point["recall"] >= 0.9995 or _stalled([earlier["recall"] for earlier in points])
        if value > chosen[name] and (over or level):
            break
    index.set_parameters(chosen)
    return points


def _own_memory() -> int:
    """Bytes of this process that are no mapped file; 0 where Linux's /proc is not."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return 1024 * int(found[1]) if found else 0


def _point(index: VectorIndex, test: RecallTest, parameters: Mapping[str, int]) -> dict[str, Any]:
    index.set_parameters(parameters)
    recall = test.recall(index, slice(0, SAMPLE))
    return {"parameters": dict(parameters), "recall": recall, "microseconds": round(test.microseconds(index), 1)}

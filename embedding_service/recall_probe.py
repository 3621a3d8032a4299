"""Recall of the live indexes, measured while they serve: a trickle of real queries against exact search.

What was measured at export holds for the queries of that day and for an index as it was written. Here a sample of the
queries that came since the last round is asked again, through the index as it answers and by scoring every stored
vector, of every version that answers now.

Exact search reads the whole catalogue. It does so chunk by chunk, and rests after each chunk for as long as keeps it
within `share` of one core. Being put behind other threads (niceness) is no way to do this: a thread that waits for a
core while it holds the interpreter's lock holds up those that answer.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from embedding_service.candidates import first_unseen
from embedding_service.exact import Float32, Metric, Vectors, exact_search
from embedding_service.live_versions import LiveVersions, Loaded
from embedding_service.ragged import Ragged
from embedding_service.retrieval import Retriever
from embedding_service.service_logs import log_event

logger = logging.getLogger(__name__)

RECENT_QUERIES = 256  # that a figure is the mean of: several rounds
LEAST_QUERIES = 16  # below which nobody is warned
SHARE = 0.02  # of one core
CHUNK_ROWS = 4096  # at a time: a few milliseconds


@dataclass(frozen=True)
class Probed:
    """What was found of one index of one version: each recent query's recall@k, and what its export has measured."""

    k: int
    measured: float
    recalls: tuple[float, ...] = ()  # at most RECENT_QUERIES
    num_queries: int = 0  # since this process began
    is_low: bool = False  # and somebody was told

    @property
    def recall(self) -> float:
        return float(np.mean(self.recalls))

    @property
    def half_width(self) -> float:
        """Of its 95 % confidence interval."""
        return 1.96 * float(np.std(self.recalls)) / math.sqrt(len(self.recalls))

    def to_document(self) -> dict[str, Any]:
        figures = {"recall": round(self.recall, 4), "half_width": round(self.half_width, 4), "measured": self.measured}
        return {"k": self.k, **figures, "num_queries": len(self.recalls), "low": self.is_low}


class RecallProbe:
    """`run` is one round, in the caller's thread; `found` is what is known: (version, index) -> Probed."""

    def __init__(
        self,
        versions: LiveVersions,
        *,
        margin: float,
        share: float = SHARE,
        rest: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """It warns where recall is certainly more than `margin` below what was measured at export."""
        self._versions, self._margin, self._share = versions, margin, share
        self._rest, self._clock = rest, clock
        self.found: dict[tuple[str, str], Probed] = {}

    def run(self) -> None:
        """Probe what answers now with what it was asked since the round before; what was not asked is not probed."""
        now = self._versions.now
        here = [now.live, *([now.canary] if now.canary is not None else [])]
        names = {loaded.version for loaded in here}
        self.found = {key: probed for key, probed in self.found.items() if key[0] in names}
        for loaded in here:
            try:
                self._probe_version(loaded)
            except _Retired:
                continue

    def _probe_version(self, loaded: Loaded) -> None:
        if loaded.api.selective is None:
            return
        retriever = loaded.api.selective.retriever
        for index, asked in retriever.asked.items():
            sample = asked.take()
            if sample is None:
                continue
            measured = retriever.artifact.manifest["indexes"][index]["recall"]
            k = max(1, min(measured["k"], retriever.candidates(index).rows - 1))
            recalls = self._recalls(loaded, retriever, index, *sample, k).tolist()
            key = loaded.version, index
            former = self.found.get(key, Probed(k, measured["value"]))
            recent = (*former.recalls, *recalls)[-RECENT_QUERIES:]
            probed = replace(former, recalls=recent, num_queries=former.num_queries + len(recalls))
            self.found = {**self.found, key: self._judged(key, probed)}  # whole: other threads read it

    def _recalls(
        self, loaded: Loaded, retriever: Retriever, index: str, queries: Float32, own: npt.NDArray[np.int64], k: int
    ) -> npt.NDArray[np.float64]:
        """For each query [n, dim] the share of its k found rows that score as high as the k-th best one: float64 [n].

        As `tuning.RecallTest` has it: of equal scores any will do, and a row is no answer to itself.
        """
        candidates = retriever.candidates(index)
        metric: Metric = retriever.artifact.manifest["indexes"][index]["metric"]
        hidden = Ragged(own, np.arange(len(own) + 1, dtype=np.int64))
        scores, _ = candidates.search_unseen(queries, k, hidden if own.max() >= 0 else None, own)

        def rest(seconds: float) -> None:
            if loaded.retired:  # else its memory would be kept for a figure that nobody asks for
                raise _Retired
            self._rest(seconds * (1.0 / self._share - 1.0))

        paced = _Paced(candidates.vectors, rest, self._clock)
        best, _ = first_unseen(*exact_search(queries, paced, k + 1, metric=metric, row_block=CHUNK_ROWS), hidden, k)
        recalls: npt.NDArray[np.float64] = (scores >= best[:, -1:]).mean(axis=1)
        return recalls

    def _judged(self, key: tuple[str, str], probed: Probed) -> Probed:
        """`probed` with `is_low` as it is now; a change is written down."""
        low = probed.measured - self._margin
        certainly = len(probed.recalls) >= LEAST_QUERIES and probed.recall + probed.half_width < low
        is_low = probed.recall < low if probed.is_low else certainly
        if is_low == probed.is_low:
            return probed
        judged = replace(probed, is_low=is_low)
        event, level = ("recall_low", logging.WARNING) if is_low else ("recall_recovered", logging.INFO)
        log_event(logger, event, level=level, version=key[0], index=key[1], **judged.to_document())
        return judged


class _Retired(Exception):
    """The version has gone while it was probed."""


class _Paced:
    """`exact.Vectors` that rest after each chunk: `rest` is told how long it has taken to read and to work on."""

    def __init__(self, vectors: Vectors, rest: Callable[[float], None], clock: Callable[[], float]) -> None:
        self._vectors, self._rest, self._clock = vectors, rest, clock
        self.rows, self.dim = vectors.rows, vectors.dim

    def take(self, rows: npt.NDArray[np.integer]) -> Float32:
        return self._vectors.take(rows)

    def chunks(self, size: int = CHUNK_ROWS) -> Iterator[tuple[int, Float32]]:
        began = self._clock()
        for start, chunk in self._vectors.chunks(size):
            yield start, chunk
            self._rest(self._clock() - began)
            began = self._clock()

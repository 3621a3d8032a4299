"""A bounded, uniform sample of the queries that were asked, at almost no cost per query."""

from __future__ import annotations

import math
import threading

import numpy as np

from embedding_service.exact import Float32, Int64


class Reservoir:
    """At most `size` of the query vectors that were offered since the last `take`, each as likely as any other.

    Algorithm L (Li 1994, ACM TOMS 20, p. 490): how many queries are passed over before the next one is kept is drawn
    then, so that most calls of `offer` add and compare one number. Many threads may call it.
    """

    def __init__(self, size: int, *, seed: int = 0) -> None:
        self._size = size
        self._rng = np.random.default_rng(seed)
        self._changing = threading.Lock()
        self._begin()

    def offer(self, queries: Float32, own: Int64 | None = None) -> None:
        """Queries [n, dim] that were searched for; `own` [n]: the rows whose vectors they are."""
        self._offered += len(queries)
        if self._offered > self._next and len(queries):
            self._keep(queries, own)

    def take(self) -> tuple[Float32, Int64] | None:
        """The sample, float32 [m, dim], and the rows whose vectors they are [m] (-1: of none); None if it is empty.

        Empties it.
        """
        with self._changing:
            kept = self._kept
            self._begin()
        if not kept:
            return None
        return np.stack([vector for vector, _ in kept]), np.array([row for _, row in kept], np.int64)

    def _begin(self) -> None:
        self._kept: list[tuple[Float32, int]] = []
        self._offered = self._next = 0
        self._weight = 1.0

    def _keep(self, queries: Float32, own: Int64 | None) -> None:
        with self._changing:
            last = len(queries) - 1
            while self._next < self._offered:
                place = self._next - self._offered + last + 1
                place = min(max(place, 0), last)  # other threads may have offered some meanwhile
                one = queries[place].copy(), -1 if own is None else int(own[place])
                if len(self._kept) < self._size:
                    self._kept.append(one)
                else:
                    self._kept[int(self._rng.integers(self._size))] = one
                self._next += 1 if len(self._kept) < self._size else self._skip()

    def _skip(self) -> int:
        """From one that is kept to the next, once there are `size` of them."""
        self._weight *= math.exp(math.log(self._rng.random() or 0.5) / self._size)
        return 1 + int(math.log(self._rng.random() or 0.5) / math.log1p(-self._weight))

"""Keys that begin with what somebody has typed, the most frequent first."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

MAX_KEYS = 2**20
_MAX_INSIDE = 2**17  # keys that are searched in their middle too
_MIN_INSIDE = 3  # characters typed until then
_REMEMBERED = 256


class Completion:
    """Finds rows by the beginning of their key, upper and lower case alike; int64 keys by their decimal digits.

    Looks at the first `MAX_KEYS` keys, which are the most frequent ones. Where too few begin so, keys follow that have
    the text further inside, among the first `_MAX_INSIDE`. Takes a second for a million keys to make; any number of
    threads may ask.
    """

    def __init__(self, keys: pa.Array) -> None:
        """`keys`: int64, string or large_string, in the order of their rows."""
        texts = pc.utf8_lower(keys[:MAX_KEYS].cast(pa.large_string()))
        order = pc.sort_indices(texts)
        self._order: npt.NDArray[np.int64] = order.to_numpy().astype(np.int64)
        self._sorted = texts.take(order)
        self._inside = texts[:_MAX_INSIDE]
        self.rows = lru_cache(_REMEMBERED)(self._find)

    def _find(self, typed: str, limit: int) -> tuple[int, ...]:
        """At most `limit` rows whose key begins with `typed`, or else has it inside; ascending within either."""
        wanted = pc.utf8_lower(pa.scalar(typed, pa.large_string())).as_py()
        places, cut = range(len(self._sorted)), len(wanted)

        def beginning(place: int) -> str:
            return str(self._sorted[place])[:cut]

        first = bisect_left(places, wanted, key=beginning)
        last = bisect_right(places, wanted, lo=first, key=beginning)
        found = self._order[first:last]
        if len(found) > limit:
            found = np.partition(found, limit - 1)[:limit]
        rows = [int(row) for row in np.sort(found)]
        if len(rows) < limit and cut >= _MIN_INSIDE:
            inside = pc.indices_nonzero(pc.match_substring(self._inside, wanted))
            more = [row for row in inside[: 2 * limit].to_pylist() if row not in rows]
            rows += more[: limit - len(rows)]
        return tuple(rows)

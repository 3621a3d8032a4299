"""What a process notes while it answers, at a fraction of a microsecond each: plain numbers, which others read.

Nothing here is exact to the last count: threads add without a lock, and a reader may see half of what a request adds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from time import perf_counter

# Upper ends of a histogram's buckets: three to a decade, 10 us .. 30 s, which is Limits.timeout_seconds.
BOUNDS_SECONDS = (
    1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0,
)  # fmt: skip
MAX_VERSIONS = 16


class Timing:
    """How many observations fell into each bucket of `BOUNDS_SECONDS`, its end included, and beyond; and their sum."""

    __slots__ = ("counts", "seconds")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_SECONDS) + 1)
        self.seconds = 0.0

    def note(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS_SECONDS, seconds)] += 1
        self.seconds += seconds

    def since(self, start: float) -> None:
        """`note` the time since `start`, a `perf_counter`."""
        seconds = perf_counter() - start
        self.counts[bisect_left(BOUNDS_SECONDS, seconds)] += 1
        self.seconds += seconds


class Instruments:
    """One process's. The stages of an answer, each noted once per call: the single queries of one turn of the event
    loop share a call (`http_turns`), a batch is one.

        parse     a request's parameters or body, checked; per request
        encode    sessions to query vectors
        search    rows nearest to query vectors, scored; with wishes the search among the allowed ones
        document  from rows to keys, scores and notes
        render    JSON of a batch, or of an answer to wishes; that of a plain single query takes 2 us, and is not timed.
                  An Arrow stream is written in `document` already
    """

    def __init__(self, timed_routes: Iterable[str] = ()) -> None:
        self.parse, self.encode, self.search, self.document, self.render = (Timing() for _ in range(5))
        self.routes = {route: Timing() for route in timed_routes}  # whole requests
        self.requests: dict[tuple[str, str, int], int] = {}  # (version, "" of none; route; status) -> count
        self.num_refused = 0  # answers 503
        self.num_keys = self.num_unknown = 0  # item keys that queries named, and those that the version does not have

    @property
    def stages(self) -> dict[str, Timing]:
        return {name: getattr(self, name) for name in ("parse", "encode", "search", "document", "render")}

    def note_request(self, version: str, route: str, status: int, seconds: float) -> None:
        """`route` is one of few: what a client makes up would fill the memory."""
        key = version, route, status
        self.requests[key] = self.requests.get(key, 0) + 1
        timing = self.routes.get(route)
        if timing is not None:
            timing.note(seconds)
        if status == 503:
            self.num_refused += 1

    def note_refusal(self, route: str, num: int = 1) -> None:
        """`num` requests that were refused before a version was chosen; they took no time to speak of."""
        key = "", route, 503
        self.requests[key] = self.requests.get(key, 0) + num
        self.num_refused += num

    def forget_old_versions(self) -> None:
        """Let go of the requests of all but the last `MAX_VERSIONS` versions that came."""
        versions = list(dict.fromkeys(version for version, _, _ in list(self.requests) if version))
        if gone := set(versions[:-MAX_VERSIONS]):
            self.requests = {key: count for key, count in list(self.requests.items()) if key[0] not in gone}

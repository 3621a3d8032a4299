"""What one replica has seen of a version: requests, latency, clicks on what it answered; and who sees a canary."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, NamedTuple

_BUCKETS_PER_OCTAVE = 4
_SMALLEST_SECONDS = 1e-5
_NUM_BUCKETS = 24 * _BUCKETS_PER_OCTAVE  # up to 168 s
_BOUNDS_SECONDS = [_SMALLEST_SECONDS * 2.0 ** (i / _BUCKETS_PER_OCTAVE) for i in range(1, _NUM_BUCKETS)]
_REMEMBERED = 100_000  # request ids, and items clicked on in them, that were counted


class Interval(NamedTuple):
    low: float
    high: float


def wilson(successes: int, trials: int, z: float = 1.959964) -> Interval:
    """The score interval of a proportion (Wilson 1927, JASA 22, p. 210), by default of 95 % confidence.

    (p + z^2/2n +- z sqrt(p(1 - p)/n + z^2/4n^2)) / (1 + z^2/n). Raises ValueError unless 0 <= successes <= trials > 0.
    """
    if not 0 <= successes <= trials or not trials:
        raise ValueError(f"{successes} successes in {trials} trials")
    share, square = successes / trials, z * z / trials
    centre = share + square / 2
    spread = z * math.sqrt(share * (1 - share) / trials + square / trials / 4)
    return Interval(max(0.0, (centre - spread) / (1 + square)), min(1.0, (centre + spread) / (1 + square)))


def takes_canary(caller: bytes, version: str, share: float) -> bool:
    """Whether `share` (0..1) of the callers, which is stable for a caller and a version, has this one in it."""
    digest = hashlib.blake2b(caller, digest_size=8, key=version.encode()[:64]).digest()
    return int.from_bytes(digest, "big") < share * 2.0**64


class Tally:
    """Counts of one version in one process; `counts` of several processes can be added up."""

    def __init__(self) -> None:
        self.requests = self.failed = self.answered = self.clicked = self.clicks = 0
        self._buckets = [0] * _NUM_BUCKETS
        self._clicked: OrderedDict[Hashable, None] = OrderedDict()

    def note(self, status: int, seconds: float, *, recommends: bool) -> None:
        """One request; `recommends`: its answer is something that a user may click on."""
        self.requests += 1
        if status >= 500:
            self.failed += 1
        elif recommends and status == 200:
            self.answered += 1
        self._buckets[bisect_right(_BOUNDS_SECONDS, seconds)] += 1

    def note_click(self, request_id: str, key: Hashable) -> bool:
        """A click on an item of an answer, which counts once; the first one on each request makes it a clicked one.

        Whether it counts: false where it is among the last that were noted. That the request was answered is taken on
        trust: any process may be told of it, and none knows what the others have answered.
        """
        if not self._first((request_id, key)):
            return False
        self.clicks += 1
        self.clicked += self._first(request_id)
        return True

    def _first(self, seen: Hashable) -> bool:
        """Whether this was not among the last ones seen; now it is."""
        if seen in self._clicked:
            return False
        self._clicked[seen] = None
        if len(self._clicked) > _REMEMBERED:
            self._clicked.popitem(last=False)
        return True

    def counts(self) -> dict[str, Any]:
        names = ("requests", "failed", "answered", "clicked", "clicks")
        return {**{name: getattr(self, name) for name in names}, "latency_buckets": list(self._buckets)}


def figures(counts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Requests, latency and click-through rate of the `Tally.counts` of all processes together.

    p50_ms and p99_ms are the upper ends of their buckets, at most a fifth too high; ctr is clicked requests over
    answered ones, ctr_low and ctr_high its Wilson interval; None where there is nothing to count.
    """
    names = ("requests", "failed", "answered", "clicked", "clicks")
    total: dict[str, Any] = dict.fromkeys(names, 0)
    buckets = [0] * _NUM_BUCKETS
    for one in counts:
        for name in names:
            total[name] += int(one[name])
        buckets = [a + int(b) for a, b in zip(buckets, one["latency_buckets"], strict=True)]
    trials, clicked = total["answered"], min(total["clicked"], total["answered"])
    interval = wilson(clicked, trials) if trials else Interval(0.0, 1.0)
    return {
        **total,
        "p50_ms": _quantile_ms(buckets, 0.5),
        "p99_ms": _quantile_ms(buckets, 0.99),
        "ctr": clicked / trials if trials else None,
        "ctr_low": interval.low,
        "ctr_high": interval.high,
    }


def _quantile_ms(buckets: list[int], share: float) -> float | None:
    seen, wanted = 0, share * sum(buckets)
    for number, count in enumerate(buckets):
        seen += count
        if count and seen >= wanted:
            return 1e3 * _SMALLEST_SECONDS * float(2.0 ** ((number + 1) / _BUCKETS_PER_OCTAVE))
    return None

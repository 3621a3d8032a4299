"""The figures of one replica, as metrics: what they are called, and their values now.

`METRICS` is the whole list; deploy/grafana/retrieval.json draws them. `ServiceMetrics.samples` reads what the replica
has noted (`instruments`), what it has in memory (`live_versions`) and what the probe has found (`recall_probe`). It is
called every few seconds by a thread: no request waits for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from cluster.errors import ArtifactError
from cluster.metrics import Distribution, Metric, Sample
from embedding_service.instruments import BOUNDS_SECONDS, Instruments, Timing
from embedding_service.live_versions import LiveVersions, Loaded
from embedding_service.recall_probe import RecallProbe
from embedding_service.scatter import Scatter
from embedding_service.service_logs import log_event
from embedding_service.versions import VersionStore

logger = logging.getLogger(__name__)

PUBLISH_SECONDS = 5.0  # between two times that metrics are published; Ray passes them on every 10 s

_PER_INDEX = ("version", "index")
METRICS = (
    Metric("lexshard_requests", "counter", "requests answered; version: of the answer", ("version", "route", "status")),
    Metric("lexshard_refused", "counter", "requests answered with 503: too many wait, or it took too long"),
    Metric("lexshard_request_seconds", "histogram", "from the request's arrival in the replica on", ("route",)),
    Metric("lexshard_stage_seconds", "histogram", "what the stages of answers take, per call", ("stage",)),
    Metric("lexshard_in_flight", "gauge", "requests that are being answered", ("version",)),
    Metric("lexshard_waiting", "gauge", "large requests in threads, or waiting for one", ("version",)),
    Metric("lexshard_keys", "counter", "item keys that queries named"),
    Metric("lexshard_unknown_keys", "counter", "item keys that queries named and the version does not have"),
    Metric("lexshard_live", "gauge", "1 for the version that is live in this replica", ("version",)),
    Metric("lexshard_canary_share", "gauge", "share of the callers that the canary answers", ("version",)),
    Metric("lexshard_lost_shards", "gauge", "shards of the indexes that do not answer this replica", ("version",)),
    Metric("lexshard_version_problem", "gauge", "1 while the replica is not where the versions' state wants it"),
    Metric("lexshard_index_bytes", "gauge", "an index in memory", _PER_INDEX),
    Metric(
        "lexshard_recall", "gauge", "recall@k of recent queries through the index, against exact search", _PER_INDEX
    ),
    Metric("lexshard_recall_half_width", "gauge", "of the 95 % confidence interval of lexshard_recall", _PER_INDEX),
    Metric("lexshard_recall_measured", "gauge", "recall@k that the export of the version has measured", _PER_INDEX),
    Metric("lexshard_recall_queries", "counter", "queries that were probed", _PER_INDEX),
    Metric("lexshard_gate", "gauge", "what a gate measured before the version went live", ("version", "gate")),
)


class ServiceMetrics:
    """Call `samples` from one thread."""

    def __init__(
        self,
        instruments: Instruments,
        versions: LiveVersions,
        store: VersionStore | None,
        probe: RecallProbe | None = None,
        *,
        scatter: Scatter | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """scatter: the processes that hold the indexes, if this one does not."""
        self._instruments, self._versions, self._store, self._probe = instruments, versions, store, probe
        self._scatter = scatter
        self._overload = Overload(instruments, clock)
        self._gates: dict[str, list[dict[str, Any]]] = {}

    def samples(self) -> Iterator[Sample | Distribution]:
        """The values of all `METRICS` that have one; also notes whether an overload has begun or ended."""
        self._overload.look()
        yield from self._of_requests()
        now = self._versions.now
        here = [now.live, *([now.canary] if now.canary is not None else [])]
        self._gates = {loaded.version: self._gates_of(loaded.version) for loaded in here}
        for loaded in here:
            yield from self._of_version(loaded)
        yield Sample("lexshard_live", (now.live.version,), 1.0)
        if now.canary is not None:
            yield Sample("lexshard_canary_share", (now.canary.version,), now.share)
        yield Sample("lexshard_version_problem", (), float(bool(self._versions.problem)))
        yield from self._of_probe()
        self._instruments.forget_old_versions()

    def _of_requests(self) -> Iterator[Sample | Distribution]:
        noted = self._instruments
        for (version, route, status), count in list(noted.requests.items()):
            yield Sample("lexshard_requests", (version, route, str(status)), count)
        yield Sample("lexshard_refused", (), noted.num_refused)
        yield Sample("lexshard_keys", (), noted.num_keys)
        yield Sample("lexshard_unknown_keys", (), noted.num_unknown)
        for route, timing in noted.routes.items():
            yield _distribution("lexshard_request_seconds", route, timing)
        for stage, timing in noted.stages.items():
            yield _distribution("lexshard_stage_seconds", stage, timing)

    def _of_version(self, loaded: Loaded) -> Iterator[Sample]:
        version = loaded.version
        yield Sample("lexshard_in_flight", (version,), loaded.in_flight)
        yield Sample("lexshard_waiting", (version,), loaded.api.num_waiting)
        yield Sample("lexshard_lost_shards", (version,), len(self._scatter.lost_of(version)) if self._scatter else 0)
        if loaded.api.selective is not None:
            for index, entry in loaded.api.selective.retriever.artifact.manifest["indexes"].items():
                yield Sample("lexshard_index_bytes", (version, index), entry["bytes"])
                yield Sample("lexshard_recall_measured", (version, index), entry["recall"]["value"])
        for figure in self._gates[version]:
            if figure["value"] is not None:
                yield Sample("lexshard_gate", (version, figure["gate"]), figure["value"])

    def _of_probe(self) -> Iterator[Sample]:
        for labels, probed in (self._probe.found if self._probe is not None else {}).items():
            yield Sample("lexshard_recall", labels, probed.recall)
            yield Sample("lexshard_recall_half_width", labels, probed.half_width)
            yield Sample("lexshard_recall_queries", labels, probed.num_queries)

    def _gates_of(self, version: str) -> list[dict[str, Any]]:
        """Read once: a version is judged before it is here."""
        if version in self._gates or self._store is None:
            return self._gates.get(version, [])
        try:
            figures: list[dict[str, Any]] = (self._store.verdict(version) or {}).get("figures", [])
            return figures
        except (ArtifactError, OSError) as error:
            logger.warning("the gates' figures of version %s are left out: %s", version, error)
            return []


class Overload:
    """Whether requests are refused (503) these days; what begins and ends is logged once."""

    def __init__(self, instruments: Instruments, clock: Callable[[], float] = time.monotonic) -> None:
        self._instruments, self._clock = instruments, clock
        self._refused = instruments.num_refused
        self._began: tuple[float, int] | None = None  # when, and how many had been refused before

    def look(self) -> None:
        """Hold the count of refusals against the last look's: with more it goes on, without it is over."""
        former, self._refused = self._refused, self._instruments.num_refused
        if self._refused > former and self._began is None:
            self._began = self._clock(), former
            log_event(logger, "overload_began", level=logging.WARNING, refused=self._refused - former)
        elif self._refused == former and self._began is not None:
            began, before = self._began
            self._began = None
            seconds = round(self._clock() - began, 1)
            log_event(logger, "overload_ended", refused=self._refused - before, seconds=seconds)


def _distribution(metric: str, label: str, timing: Timing) -> Distribution:
    return Distribution(metric, (label,), BOUNDS_SECONDS, list(timing.counts), timing.seconds)

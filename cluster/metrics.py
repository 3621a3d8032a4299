"""Figures that a process tells the world: declared once, and published through Ray, which Prometheus scrapes.

A node's Ray agent gathers what the processes on it publish and answers `GET http://<node>:<port>/metrics`; the port is
`ray start --metrics-export-port`, or that of `node_metrics_addresses`. There a metric is called `Metric.exported`.

A histogram is published as gauges `..._bucket{le}`, `..._sum` and `..._count` that never fall: to PromQL they are one
(`histogram_quantile` asks for the label `le`, `rate` for values that grow). Ray's own histograms take one observation
at a time, in the process and, in a loop in Python, again in the node's agent, which thousands of requests per second
are too many for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

_REQUEST_HISTOGRAMS = frozenset(
    ("serve_deployment_processing_latency_ms", "serve_http_request_latency_ms", "serve_grpc_request_latency_ms")
)
_PREFIX = "ray_"  # Ray's, of every metric


@dataclass(frozen=True)
class Metric:
    """A declaration. A counter's samples are totals that only grow; a histogram's values are the `le` totals."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    about: str
    labels: tuple[str, ...] = ()

    @property
    def exported(self) -> dict[str, tuple[str, ...]]:
        """name -> labels of the series that Prometheus sees, besides Ray's own labels."""
        name = _PREFIX + self.name
        if self.kind == "histogram":
            return {f"{name}_bucket": (*self.labels, "le"), f"{name}_sum": self.labels, f"{name}_count": self.labels}
        return {f"{name}_total" if self.kind == "counter" else name: self.labels}


class Sample(NamedTuple):
    """The value of a metric for one set of labels, in the order of their declaration."""

    metric: str
    labels: tuple[str, ...]
    value: float


class Distribution(NamedTuple):
    """A histogram for one set of labels: `counts` [len(bounds) + 1] per bucket, the last one beyond all `bounds`."""

    metric: str
    labels: tuple[str, ...]
    bounds: Sequence[float]
    counts: Sequence[int]
    total: float


class RayMetrics:
    """Publishes samples as metrics of this Ray process; in a Serve replica they bear its labels too.

    Gauges that are not published again vanish after some 20 seconds: a version that is gone has no figures.
    """

    def __init__(self, declared: Iterable[Metric]) -> None:
        from ray.serve import metrics

        self._declared = {metric.name: metric for metric in declared}
        self._published: dict[tuple[str, tuple[str, ...]], float] = {}  # of counters, which Ray is told the growth of
        self._ray: dict[str, Any] = {}
        counter: Any = metrics.Counter  # typed as if they had one label at most
        gauge: Any = metrics.Gauge
        for metric in self._declared.values():
            if metric.kind == "counter":
                self._ray[metric.name] = counter(metric.name, metric.about, tag_keys=metric.labels)
                continue
            for name, labels in metric.exported.items():
                name = name.removeprefix(_PREFIX)
                self._ray[name] = gauge(name, metric.about, tag_keys=labels)

    def publish(self, samples: Iterable[Sample | Distribution]) -> None:
        """Meant for a thread: each value takes microseconds, and after each the others may go on."""
        counted = set()
        for sample in samples:
            metric = self._declared[sample.metric]
            tags = dict(zip(metric.labels, sample.labels, strict=True))
            if isinstance(sample, Distribution):
                self._publish_distribution(sample, tags)
            elif metric.kind == "counter":
                self._publish_count(sample, tags)
                counted.add((sample.metric, sample.labels))
            else:
                self._ray[sample.metric].set(float(sample.value), tags=tags)
            time.sleep(0)  # gives the interpreter's lock away
        self._published = {key: self._published[key] for key in counted}

    def _publish_count(self, sample: Sample, tags: Mapping[str, str]) -> None:
        key = sample.metric, sample.labels
        former = self._published.get(key, 0.0)
        growth = sample.value - former if sample.value >= former else sample.value  # it was begun anew
        if growth > 0:  # Ray refuses 0
            self._ray[sample.metric].inc(float(growth), tags=dict(tags))
        self._published[key] = sample.value

    def _publish_distribution(self, sample: Distribution, tags: dict[str, str]) -> None:
        seen = 0
        for bound, count in zip([*map(str, sample.bounds), "+Inf"], sample.counts, strict=True):
            seen += count
            self._ray[f"{sample.metric}_bucket"].set(float(seen), tags={**tags, "le": bound})
            time.sleep(0)
        self._ray[f"{sample.metric}_sum"].set(float(sample.total), tags=tags)
        self._ray[f"{sample.metric}_count"].set(float(seen), tags=tags)


def leave_out_request_histograms() -> None:
    """Have Serve observe no latency of this replica's requests: `Instruments` has them, at a small part of the cost.

    Ray passes a histogram on as its observations, one by one, in a loop in Python in the node's agent, and Serve makes
    them on the replica's event loop, ten times a second all at once. Its counters and gauges stay.
    """
    from ray.serve import metrics as of_serve
    from ray.util import metrics as of_ray

    for kind in (of_serve.Histogram, of_ray.Histogram):
        setattr(kind, "observe", _observing_others(kind.observe))  # noqa: B010 - mypy lets none be assigned


def _observing_others(observe: Callable[..., None]) -> Callable[..., None]:
    def observe_others(self: Any, value: float, tags: dict[str, str] | None = None) -> None:
        if self._name not in _REQUEST_HISTOGRAMS:
            observe(self, value, tags)

    return observe_others


def node_metrics_addresses() -> list[str]:
    """Where each living node of the Ray cluster that this process has joined is scraped."""
    import ray

    known: Any = ray.nodes  # untyped
    nodes = [node for node in known() if node["Alive"] and node["MetricsExportPort"] > 0]
    return [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]

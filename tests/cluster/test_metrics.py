"""Metrics on their way to Ray: what each kind becomes there."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.metrics import Distribution, Metric, RayMetrics, Sample

DECLARED = (
    Metric("asked", "counter", "questions", ("route",)),
    Metric("depth", "gauge", "of a queue"),
    Metric("seconds", "histogram", "of an answer", ("stage",)),
)


class Recorder:
    """A Ray metric that keeps what it is told: (labels, value) in order."""

    made: dict[str, Recorder]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.tag_keys, self.told = tag_keys, []  # type: ignore[var-annotated]
        Recorder.made[name] = self

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self.tag_keys)
        self.told.append((tags, value))

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0  # Ray raises for others
        self.set(value, tags)


@pytest.fixture
def ray_metrics(monkeypatch: pytest.MonkeyPatch) -> RayMetrics:
    from ray.serve import metrics

    Recorder.made = {}
    monkeypatch.setattr(metrics, "Counter", Recorder)
    monkeypatch.setattr(metrics, "Gauge", Recorder)
    return RayMetrics(DECLARED)


def told(name: str) -> list[Any]:
    return Recorder.made[name].told


def test_a_counter_is_told_its_growth(ray_metrics: RayMetrics) -> None:
    for total in (0, 3, 3, 10, 2):  # the last one was begun anew
        ray_metrics.publish([Sample("asked", ("/a",), total), Sample("asked", ("/b",), 1)])
    assert [value for tags, value in told("asked") if tags == {"route": "/a"}] == [3, 7, 2]
    assert [value for tags, value in told("asked") if tags == {"route": "/b"}] == [1]


def test_a_gauge_is_told_every_time(ray_metrics: RayMetrics) -> None:
    for value in (2, 2, 0):
        ray_metrics.publish([Sample("depth", (), value)])
    assert told("depth") == [({}, 2.0), ({}, 2.0), ({}, 0.0)]


def test_a_histogram_is_cumulative(ray_metrics: RayMetrics) -> None:
    ray_metrics.publish([Distribution("seconds", ("parse",), (0.1, 1.0), [4, 0, 2], 7.5)])
    buckets = {tags["le"]: value for tags, value in told("seconds_bucket")}
    assert buckets == {"0.1": 4.0, "1.0": 4.0, "+Inf": 6.0}
    assert told("seconds_count") == [({"stage": "parse"}, 6.0)]
    assert told("seconds_sum") == [({"stage": "parse"}, 7.5)]


def test_what_is_not_declared_is_a_bug(ray_metrics: RayMetrics) -> None:
    with pytest.raises(KeyError):
        ray_metrics.publish([Sample("other", (), 1)])
    with pytest.raises(ValueError, match="argument"):
        ray_metrics.publish([Sample("asked", (), 1)])


def test_what_prometheus_sees() -> None:
    series = [metric.exported for metric in DECLARED]
    assert series[:2] == [{"ray_asked_total": ("route",)}, {"ray_depth": ()}]
    assert series[2] == {
        "ray_seconds_bucket": ("stage", "le"),
        "ray_seconds_sum": ("stage",),
        "ray_seconds_count": ("stage",),
    }
